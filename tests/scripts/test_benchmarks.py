"""The CPU's benchmarks, on models and shapes small enough for a test: each writes the figures that it is for."""

import json

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support.launching import dense_checkpoint
from support.models import build
from support.scripts import load_script, run_script
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.hardware import GPUS
from cap_hf.targets import find_targets

models = load_script("benchmarks/models.py")
# What the sparse backend of a dtype is called, behind `sparse`.
SUFFIXES = {"float32": "", "int8": "_int8"}


@pytest.fixture(autouse=True)
def threads():
    """Leave PyTorch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Run a benchmark with these arguments and constants, and return what it wrote."""

    def run(name, *arguments, **constants):
        path = tmp_path / "figures.json"
        run_script(f"benchmarks/{name}.py", "--json", path, *arguments, monkeypatch=monkeypatch, **constants)
        return json.loads(path.read_text())

    return run


def test_scale_writes_ratios_against_the_published_procedure(figures, monkeypatch):
    shapes = ((16, 12), (8, 24))
    found = figures(
        "scale",
        *("--threads", 1, "--repeats", 2, "--only", "fisher", "elimination"),
        SHAPES=shapes,
        NUM_GRADS=16,
        SAMPLES=8,
    )
    assert found["fisher_speedup"] == found["fisher"]["speedup"] > 0
    assert list(found["elimination"]) == ["16 x 12", "8 x 24"]
    assert found["elimination_speedup"] == min(each["speedup"] for each in found["elimination"].values())
    assert [len(each) for each in found["fisher"]["seconds"].values()] == [2, 2]


def test_scale_compares_whole_prunes_with_bare_passes(figures):
    found = figures(
        "scale",
        *("--threads", 1, "--whole_repeats", 2, "--only", "overhead", "--examples", 8, "--batch_size", 4),
        make_vit=lambda name: models.make_vit("vit-test", image_size=224, patch_size=112),
    )
    assert found["overhead_over_forward_backward"] == found["overhead"]["overhead"]
    assert [len(each) for each in found["overhead"]["seconds"].values()] == [2, 2]


def test_scale_measures_memory_and_prunes_in_children(monkeypatch, capsys):
    constants = {"SHAPES": ((16, 12),), "SAMPLES": 16}
    for side in ("ours", "published"):
        run_script("benchmarks/scale.py", "--memory_of", side, monkeypatch=monkeypatch, **constants)
        assert int(capsys.readouterr().out) >= 0
    small = {"make_vit": lambda name: models.make_vit("vit-test", image_size=224, patch_size=112)}
    run_script("benchmarks/scale.py", "--prune_of", 8, "--batch_size", 4, monkeypatch=monkeypatch, **small)
    assert float(capsys.readouterr().out) > 0


def test_growth_has_a_row_for_every_value_and_a_picture(figures, tmp_path):
    picture = tmp_path / "growth.png"
    base = {"width": 32, "block_size": 16, "num_grads": 64}
    axes = {"block size B": ("block_size", (16, 32)), "gradient samples": ("num_grads", (64,))}
    found = figures("growth", "--threads", 1, "--repeats", 2, "--plot", picture, AXES=axes, BASE=base)
    assert {title: [row["value"] for row in rows] for title, rows in found["results"].items()} == {
        "block size B": [16, 32],
        "gradient samples": [64],
    }
    assert all(len(row["seconds"]["prune"]) == 2 for rows in found["results"].values() for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_large_writes_plan_peak_and_phases(figures):
    found = figures(
        "large",
        *("--model", "small", "--fisher_block_size", 8, "--num_grads", 2),
        MODELS={"small": lambda: models.make_vit("vit-test", image_size=224, patch_size=112)},
    )
    assert (found["passes"], found["block_size"], found["sparsity"]) == (1, 8, 0.75)
    assert [phase["phase"] for phase in found["phases"]] == ["collect", "prune"]
    assert found["peak_bytes"] > 0


def test_trainer_overhead_keeps_every_step(figures, tmp_path):
    config = tmp_path / "config"
    build("ViT", image_size=8).save_pretrained(config)
    found = figures(
        "trainer_overhead",
        *("--model_name_or_path", config, "--steps", 2, "--turns", 2, "--per_device_train_batch_size", 2),
    )
    assert [len(each) for each in found["seconds"].values()] == [4, 4]
    assert found["overhead"] == pytest.approx(
        found["median_seconds_per_step"]["SparseTrainer"] / found["median_seconds_per_step"]["Trainer"] - 1
    )


def test_inference_has_a_row_for_every_setting(figures, monkeypatch):
    found = figures(
        "inference",
        *("--models", "small", "--batch_sizes", 1, 2, "--sparsities", 0.5, 0.9, "--threads", 1, "--runs", 3),
        MODELS={"small": "vit-test"},
        make_vit=lambda name: models.make_vit(name, image_size=224, patch_size=56),
    )
    rows = found["results"]
    assert {row["dtype"] for row in rows} == {"float32", "int8"}
    float32 = [row for row in rows if row["dtype"] == "float32"]
    assert [(row["model"], row["pattern"], row["sparsity"], row["batch_size"]) for row in float32] == [
        ("small", pattern, sparsity, size)
        for pattern in ("unstructured", "1x4")
        for sparsity in (0.5, 0.9)
        for size in (1, 2)
    ]
    assert all(row["speedup_vs_torch"] > 0 and row["max_difference"] < 1e-3 for row in float32)
    for row in rows:
        # Neither a processor without bfloat16 nor an environment without NNCF ends the others.
        assert not found["not_measured"].keys() - {"openvino_bf16", "openvino_int8"}
        assert (row["speedup_vs_openvino_int8"] is None) == ("openvino_int8" in found["not_measured"])
        assert row["speedup_vs_onnxruntime"] == pytest.approx(
            row["milliseconds"]["onnxruntime"][0] / row["milliseconds"]["sparse" + SUFFIXES[row["dtype"]]][0]
        )
        assert row["same_top1"]["onnxruntime"] == 1
    assert found["config"]["fisher_block_size"] == 16


def test_blocks_are_pruned_as_a_whole(tmp_path, monkeypatch):
    inference = load_script("benchmarks/inference.py")
    monkeypatch.setattr(inference, "MODELS", {"small": "vit-test"})
    monkeypatch.setattr(inference, "make_batches", lambda *sizes: models.make_batches(*sizes, 32))
    inference.prune("small", "1x4", [0.75], tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path / "0.75")
    zeros = torch.cat([(target.weight == 0).view(-1, 4).sum(1) for target in find_targets(model)])
    assert set(zeros.tolist()) == {0, 4}
    assert (zeros == 4).float().mean() == pytest.approx(0.75, abs=0.001)


def test_checkpoint_measures_packing(figures):
    found = figures("checkpoint", "--forms", "0.75", "2:4", "--sparsities", "--threads", 1, "--repeats", 1)
    forms = [(row["form"], row["dtype"]) for row in found["throughput"]]
    assert len(forms) == 6
    assert ("2:4", "torch.bfloat16") in forms
    assert all(row["pack_gb_per_second"] > 0 and row["compressed_share"] < 1 for row in found["throughput"])


def test_models_are_those_of_their_papers():
    assert {name: models.VITS[name]["hidden_size"] for name in ("vit-tiny", "vit-small", "vit-base")} == {
        "vit-tiny": 192,
        "vit-small": 384,
        "vit-base": 768,
    }
    model = models.make_vit("vit-test")
    assert isinstance(model.config, ViTConfig)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), models.make_vit("vit-test").parameters(), strict=True)
    )
    first, second = models.make_batches(4, 2, side=8, labels=3)
    assert first["pixel_values"].shape == (2, 3, 8, 8)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert torch.cat([first["labels"], second["labels"]]).max() < 3


def test_streaming_counts_what_was_sent_and_the_classes_of_it(figures):
    options = ("--datasets", "parquet-of-100", "--hows", "cap_hf")
    found = figures("streaming", *options, "--images", 4000, "--shards", 4, "--classes", 8, "--side", 40, "--count", 64)
    (row,) = found["results"]
    assert row["examples"] == 64
    assert row["classes"] >= 4
    assert 0 < row["share"] == row["sent_bytes"] / row["dataset_bytes"] < 1


def test_batch_norm_compares_old_statistics_with_new_ones(figures, tmp_path, capsys):
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 10)):
        images = [Image.fromarray(each) for each in generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)]
        rows = Dataset.from_dict({"image": images, "label": [index % 2 for index in range(count)]})
        rows.to_parquet(tmp_path / "images" / f"{split}-00000-of-00001.parquet")
    sizes = ("--epochs", 1, "--seeds", 1, "--threads", 1, "--num_grads", 16, "--examples", 8, 16)
    chosen = ("--sparsity", 0.5, "--methods", "cap", "magnitude")
    found = figures("batch_norm", *("--dataset_name", tmp_path / "images"), *sizes, *chosen, WIDTHS=[4, 8], BATCH=8)
    assert [(row["method"], row["sparsity"]) for row in found["results"]] == [
        ("dense", 0),
        ("cap", 0.5),
        ("magnitude", 0.5),
    ]
    assert all(0 <= row[way] <= 100 for row in found["results"] for way in ("old", "averages", "new, 8", "new, 16"))
    assert "| magnitude | 50% |" in capsys.readouterr().out


def test_plans_of_models_that_are_made_in_part_are_those_of_whole_ones(figures):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 224, "patch_size": 112}

    def make(layers):
        return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=layers, num_labels=1000))

    found = figures("plans", "--gpu", "H100", "--counts", 1, 8, "--num_grads", 64, MODELS={"tiny": (make, 5)})
    config = CAPConfig(num_grads=64, fisher_loss="labels")
    batch = {"pixel_values": torch.zeros(64, 3, 224, 224), "labels": torch.zeros(64, dtype=torch.long)}
    compressor = CAPCompressor(make(5), config, refits=True)
    expected = compressor.forecast([batch], (1, 8), GPUS["H100"])
    assert [row["processes"] for row in found["results"]] == [1, 8]
    for row, forecast in zip(found["results"], expected, strict=True):
        assert row["seconds"] == pytest.approx(dict(forecast.seconds), rel=1e-6)
        assert (row["block_size"], row["passes"]) == (forecast.plan.block_size, forecast.plan.num_passes)
        assert row["bytes"] == pytest.approx(forecast.plan.needed, rel=0.05)
    assert found["results"][0]["parameters"] == make(5).num_parameters()


def test_reading_says_how_long_the_model_waits(figures):
    found = figures("reading", "--models", "vit-test", "--workers", 0, 1, "--images", 12, "--batch_size", 4)
    assert [row["workers"] for row in found["results"]] == [0, 1]
    for row in found["results"]:
        assert 0 < row["waiting"] < row["seconds"]
        assert row["share_waiting"] == row["waiting"] / row["seconds"]


# Each has so large Fisher sums, in several layers, that a pass of all would be far over the limit.
WIDE = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=576, num_hidden_layers=6, patch_size=32)
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(patch_size=16, embed_dim=160, depths=[1, 2], num_heads=[2, 4])
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(patch_size=16, hidden_sizes=[32, 64, 96, 256], depths=[1, 1, 1, 2])
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 128, 224], depths=[1, 1, 1, 2], layer_type="basic")
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_prune_keeps_to_the_memory_that_it_may_take(name, figures):
    limit = psutil.Process().memory_info().rss + 400 * 10**6
    arguments = ("--max_memory", limit, "--fisher_block_size", 128, "--spill_dir", "none", "--num_grads", 2)
    (found,) = figures("memory", *arguments, "--batch_size", 2, MODELS={name: WIDE[name]})["results"]
    assert found["passes"] > 1
    assert found["over"] == found["peak_bytes"] / limit
    assert found["over"] < 1.1


def test_real_measures_what_a_checkpoint_takes_and_was_foreseen_to(figures, tmp_path):
    sizes = ("--num_grads", 16, "--batch_size", 8, "--vit", "vit-test", "--layers", 1, "--blocks", 6, 4, "--threads", 1)
    memory = ("--max_memory", "64GB", "--vit_memory", "64GB", "--repeats", 1)
    checkpoint = dense_checkpoint(tmp_path / "dense")
    found = figures("real", "--model_name_or_path", checkpoint, "--dataset_name", "digits", *sizes, *memory)
    checkpoint, layers, *eliminations = found["results"]
    assert (checkpoint["work"], layers["work"]) == ("checkpoint", "1 layers of vit-test")
    for row in (checkpoint, layers):
        assert row["passes"] == 1
        assert row["disk_bytes"] == 0
        assert min(row["seconds"], row["planned_seconds"], row["peak_bytes"], row["planned_bytes"]) > 0
        assert list(row["phases"]) == ["collect", "prune", "refit"]
    assert layers["planned_of_all_layers"]["collecting"] > 0
    assert [row["work"] for row in eliminations] == ["elimination of 6 of 32", "elimination of 4 of 128"]
    assert all(row["seconds"] > 0 for row in eliminations)


def test_elimination_writes_its_share_of_the_peak(figures):
    found = figures("elimination", "--block_sizes", 16, 24, "--memory", 10**5, "--matrix", 64, "--repeats", 2)
    rows = found["results"]
    sizes = [(row["block_size"], row["dtype"], row["blocks"]) for row in rows]
    assert sizes == [(size, dtype, 10**5 // (8 * size**2)) for dtype in ("float32", "float64") for size in (16, 24)]
    for row in rows:
        for work, operations in (("invert", 1), ("eliminate", 2 / 3)):
            rate = operations * row["block_size"] ** 3 * row["blocks"] / row[f"{work}_seconds"]
            assert row[f"{work}_flops_per_second"] == pytest.approx(rate)
            share = rate / found[f"peak_{row['dtype']}"]["flops_per_second"]
            assert row[f"{work}_share_of_peak"] == pytest.approx(share)
