"""`cap-hf prune` as a user meets it: results, reports, second runs, one-line errors."""

import itertools
import json

import pytest
import torch
import yaml
from support.backbones import backbone_checkpoint, clip_checkpoint, tiny_dinov2
from support.checkpoints import assert_same_weights
from support.commands import DIGITS, image_folder, prune
from support.models import build
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    Dinov2Model,
)

from cap_hf import CAPConfig, find_targets
from cap_hf.checkpoints.folder import COMPANIONS
from cap_hf.commands.main import main
from cap_hf.hub.publish import prepare_folder


def test_prune_writes_checkpoints_and_a_report(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    assert prune(tiny_checkpoint, output, "--sparsity", "0.9", "0.5") == 0
    printed = capsys.readouterr().out
    assert "sparsity-0.5" in printed
    assert "dense" in printed
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "sparsity-0.5", "sparsity-0.9"]
    report = json.loads((output / "report.json").read_text())
    assert [result["checkpoint"] for result in report["results"]] == ["sparsity-0.5", "sparsity-0.9"]
    assert report["dense"]["num_examples"] == 50
    assert report["seed"] == 42
    assert {"torch", "transformers", "python"} <= report["versions"].keys()
    phases = {record["phase"]: record for record in report["phases"]}
    assert {"load", "collect", "prune 0.5", "evaluate dense", "evaluate 0.9"} <= phases.keys()
    assert all(record["seconds"] >= 0 and record["peak_memory_bytes"]["cpu"] > 0 for record in phases.values())
    for result, sparsity in zip(report["results"], (0.5, 0.9), strict=True):
        folder = output / result["checkpoint"]
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "cap_config.json", "report.json"} == {
            path.name for path in folder.iterdir()
        }
        assert CAPConfig.load(folder).num_grads == 32
        weights = AutoModelForImageClassification.from_pretrained(folder).state_dict()
        zeros = {layer["name"]: layer for layer in result["pruning"]["layers"]}
        for name, layer in zeros.items():
            assert int((weights[f"{name}.weight"] == 0).sum()) == layer["num_zeros"]
            assert layer["block_size"] in (16, 32)
            assert layer["loss"] >= 0
        total = sum(layer["num_weights"] for layer in zeros.values())
        assert sum(layer["num_zeros"] for layer in zeros.values()) == round(total * sparsity)
        assert json.loads((folder / "report.json").read_text())["sparse"] == result["sparse"]
        AutoImageProcessor.from_pretrained(folder)


def test_a_pruned_checkpoint_is_pruned_further(tiny_checkpoint, tmp_path):
    assert prune(tiny_checkpoint, tmp_path / "a", "--sparsity", "0.5") == 0
    assert prune(tmp_path / "a" / "sparsity-0.5", tmp_path / "b", "--sparsity", "0.8") == 0
    first, second = (
        AutoModelForImageClassification.from_pretrained(tmp_path / folder)
        for folder in ("a/sparsity-0.5", "b/sparsity-0.8")
    )
    for before, after in zip(find_targets(first), find_targets(second), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
    assert sum(int((target.weight == 0).sum()) for target in find_targets(second)) > 0


def test_a_sparsity_below_the_checkpoints_is_found_before_the_collection(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    assert prune(tiny_checkpoint, tmp_path / "a", "--sparsity", "0.5") == 0
    monkeypatch.setattr("cap_hf.compressor.CAPCompressor.collect", None)
    assert prune(tmp_path / "a" / "sparsity-0.5", tmp_path / "b", "--sparsity", "0.3", "0.8") == 1
    assert "sparse already: sparsity 0.3 would be less" in capsys.readouterr().err


def test_a_second_run_replaces_only_when_asked(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5") == 0
    before = (output / "sparsity-0.5" / "model.safetensors").read_bytes()
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5", "--method", "magnitude") == 1
    assert "exists: choose another --output_dir or pass --overwrite_output_dir" in capsys.readouterr().err
    assert (output / "sparsity-0.5" / "model.safetensors").read_bytes() == before
    again = ["--sparsity", "0.5", "--overwrite_output_dir"]
    assert prune(tiny_checkpoint, output, *again) == 0
    assert (output / "sparsity-0.5" / "model.safetensors").read_bytes() == before
    assert prune(tiny_checkpoint, output, *again, "--method", "magnitude") == 0
    assert (output / "sparsity-0.5" / "model.safetensors").read_bytes() != before


def test_yaml_and_json_files(tiny_checkpoint, tmp_path):
    arguments = {
        "model_name_or_path": str(tiny_checkpoint),
        "output_dir": str(tmp_path / "yaml"),
        "sparsity": [0.5],
        "num_grads": 32,
        "fisher_block_size": 8,
        "damp": 1e-3,
        "include": None,
        "do_eval": False,
        "disable_tqdm": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments))
    (tmp_path / "run.json").write_text(json.dumps(arguments | {"output_dir": str(tmp_path / "json")}))
    assert main(["prune", str(tmp_path / "run.yaml")]) == 0
    assert main(["prune", str(tmp_path / "run.json")]) == 0
    files = [(tmp_path / name / "sparsity-0.5" / "model.safetensors").read_bytes() for name in ("yaml", "json")]
    assert files[0] == files[1]
    report = json.loads((tmp_path / "yaml" / "report.json").read_text())
    assert report["dense"] is None
    assert report["config"]["fisher_block_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.0"], "sparsity 1 is not in [0, 1)"),
        (["--sparsity", "-0.5"], "sparsity -0.5 is not in [0, 1)"),
        ([], "say how sparse: --sparsity 0.5 0.75 0.9"),
        (["--sparsity", "half"], "sparsity 'half' is no number, and no range such as 0.5:0.95:0.05"),
        (["--sparsity", "0.5", "--sparsty", "0.5"], "unknown: --sparsty 0.5; cap-hf prune --help"),
        (["--sparsity", "0.5", "--method", "best"], "argument --method: invalid choice: 'best'"),
        (["--allocation", "2:5"], "2:5 does not divide the 16 input channels of vit.layers.0.attention.q_proj"),
        (
            ["--allocation", "2:4", "--sparsity", "0.7"],
            "sparsity 0.7 contradicts 2:4, which is sparsity 0.5",
        ),
        (["--allocation", "4:2"], "allocation='4:2' is not global, uniform or N:M"),
        (["--sparsity", "0.5", "--include", "*.fc7"], "--include '*.fc7' matches no target"),
        (["--sparsity", "0.5", "--dataset_name", "/nowhere"], "--dataset_name /nowhere cannot be loaded"),
        (["--sparsity", "0.5", "--image_column_name", "img"], "no column 'img'"),
        (["--sparsity", "0.5", "--eval_split_name", "val"], "no split 'val'; it has train, test"),
        (["--sparsity", "0.5", "--per_device_batch_size", "-1", "--num_grads", "0"], "num_grads=0"),
        (["--sparsity", "0.5", "--damp", "0"], "damp=0.0 must be greater than 0"),
        (["--sparsity", "0.5", "--seed", "-1"], "seed=-1 must be a whole number"),
        (["--sparsity", "0.9999999999999"], "is not in [0, 1)"),
    ],
)
def test_a_users_mistake_is_one_line(tiny_checkpoint, tmp_path, capsys, arguments, message):
    values = ["prune", "--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(tmp_path / "out"), *arguments]
    assert main(values) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("cap-hf prune: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sparsities_that_are_close_have_folders_of_their_own(tiny_checkpoint, tmp_path):
    close = ["--sparsity", "0.1234567", "0.12345671", "0.1234567", "0.9999999"]
    assert prune(tiny_checkpoint, tmp_path / "out", *close, "--no_do_eval", "--method", "magnitude") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "sparsity-0.1234567", "sparsity-0.12345671", "sparsity-0.9999999"}


def test_a_bad_output_dir_is_found_first(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert prune(tiny_checkpoint, output, "--sparsity", "0.5", "--dataset_name", "/nowhere") == 1
        assert "file is a file: choose another --output_dir" in capsys.readouterr().err


def test_a_state_is_gone_on_from_where_there_is_one(tiny_checkpoint, tmp_path, capsys):
    for arguments, message in (
        (["--resume"], "--resume goes with --checkpoint_every"),
        (["--resume", "--checkpoint_every", "8"], "out-collection is not there, so nothing was saved"),
        (["--checkpoint_every", "0"], "checkpoint_every=0 must be at least 1"),
    ):
        assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5", *arguments) == 1
        assert message in capsys.readouterr().err
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5", "--checkpoint_every", "8") == 0
    assert not (tmp_path / "out-collection").exists()


def test_calibration_is_on_the_train_split_alone(tiny_checkpoint, tmp_path, capsys):
    image_folder(tmp_path / "data", ("train",), DIGITS)
    data = ["--sparsity", "0.5", "--dataset_name", str(tmp_path / "data")]
    assert prune(tiny_checkpoint, tmp_path / "out", *data) == 1
    assert "no validation or test split" in capsys.readouterr().err
    assert prune(tiny_checkpoint, tmp_path / "out", *data, "--no_do_eval") == 0
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "test")
    assert prune(tiny_checkpoint, tmp_path / "other", *data, "--no_do_eval") == 1
    assert "no split 'train'; it has test" in capsys.readouterr().err


def test_labels_of_another_dataset_are_one_line(tiny_checkpoint, tmp_path, capsys):
    image_folder(tmp_path / "data", ("train", "test"), ("cat", "dog"))
    data = ["--sparsity", "0.5", "--dataset_name", str(tmp_path / "data")]
    assert prune(tiny_checkpoint, tmp_path / "out", *data) == 1
    assert "'label' has 2 classes (cat, dog), the model has 10: LABEL_0" in capsys.readouterr().err


def test_batch_norm_is_estimated_anew_where_there_is_any(tiny_checkpoint, tmp_path, capsys):
    model = build("ResNet", num_channels=1)
    model.save_pretrained(tmp_path / "resnet")
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "resnet")
    statistics, norms = {}, sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for wish in (None, "false"):
        output = tmp_path / str(wish)
        options = [] if wish is None else ["--recalibrate_batch_norm", wish, "--refit", wish]
        assert prune(tmp_path / "resnet", output, "--sparsity", "0.5", "--do_eval", "false", *options) == 0
        report = json.loads((output / "report.json").read_text())
        assert len(report["results"][0]["recalibrated_batch_norm"]) == (norms if wish is None else 0)
        assert report["left_alone"]["classifier.1"] == "outside the encoder, resnet"
        phases = [phase["phase"] for phase in report["phases"]]
        assert phases[3:] == (["refit 0.5", "batch norm 0.5"] if wish is None else [])
        refit = report["results"][0]["pruning"]["refit"]
        asked = {"examples": CAPConfig().refit_examples, "ridge": CAPConfig().refit_ridge, "left_alone": []}
        assert refit == (asked if wish is None else None)
        state = AutoModelForImageClassification.from_pretrained(output / "sparsity-0.5").state_dict()
        statistics[wish] = {name: value for name, value in state.items() if "running" in name}
    before = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in statistics["false"].items())
    assert not any(torch.equal(value, before[name]) for name, value in statistics[None].items())
    assert prune(tiny_checkpoint, tmp_path / "vit", "--sparsity", "0.5", "--recalibrate_batch_norm", "true") == 1
    assert "ViTForImageClassification has no batch norm: leave --recalibrate_batch_norm out" in capsys.readouterr().err
    assert not (tmp_path / "vit").exists()


def test_a_backbone_is_pruned_and_measured_by_its_features(tmp_path, capsys):
    dense, output = backbone_checkpoint(tmp_path / "dense"), tmp_path / "out"
    assert prune(dense, output, "--sparsity", "0.5", "0.9", "--knn_bank_size", "100") == 0
    lines = capsys.readouterr().out.splitlines()
    header = "model sparsity % k-NN % drop linear % cosine 5th pct patch error"
    assert lines[0].split() == header.split()
    assert all(len(line) <= 100 for line in lines[:5])
    report = json.loads((output / "report.json").read_text())
    assert report["dense"]["cosine"] == 1
    half, most = (result["sparse"] for result in report["results"])
    for measured in (report["dense"], half, most):
        assert (measured["num_examples"], measured["bank_examples"]) == (50, 100)
        assert all(0.15 < measured[probe] < 1 for probe in ("knn_top1", "linear_top1"))
    assert most["cosine_p5"] <= most["cosine"] < half["cosine"] < 1
    assert 0 < half["patch_error"] < most["patch_error"]
    assert {"knn_top1_se", "knn_top1_drop_se", "linear_top1_drop_se"} < half.keys()
    loaded = Dinov2Model.from_pretrained(output / "sparsity-0.5")
    total = sum(target.weight.numel() for target in find_targets(loaded))
    assert sum(int((target.weight == 0).sum()) for target in find_targets(loaded)) == round(total / 2)
    assert json.loads((output / "sparsity-0.9" / "report.json").read_text())["sparse"] == most


def test_images_without_labels_are_enough_for_a_backbone_and_for_a_classifier(tiny_checkpoint, tmp_path, capsys):
    data = image_folder(tmp_path / "data", ("train", "test"), ("",))
    backbone = backbone_checkpoint(tmp_path / "backbone")
    kinds = ((backbone, {"patch_error"}), (tiny_checkpoint, set()))
    for (model, patches), method in itertools.product(kinds, ("cap", "wanda")):
        output = tmp_path / f"out-{model.name}-{method}"
        assert prune(model, output, "--sparsity", "0.5", "--method", method, "--dataset_name", str(data)) == 0
        (result,) = json.loads((output / "report.json").read_text())["results"]
        assert result["sparse"].keys() == {"cosine", "cosine_se", "cosine_p5", "num_examples"} | patches
        assert "k-NN" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label_column_name", "kind"], "there is no column 'kind'"),
        (["--knn_bank_size", "19"], "the bank has 19 labelled train images, and k-NN asks the nearest 20: raise"),
        (["--knn_bank_size", "-1"], "knn_bank_size=-1 must be at least 0"),
        (
            ["--fisher_loss", "labels"],
            "fisher_loss='labels' is for models that tell classes apart, and Dinov2Model has",
        ),
    ],
)
def test_a_mistake_about_a_backbones_labels_is_one_line(tmp_path, capsys, arguments, message):
    dense = backbone_checkpoint(tmp_path / "dense")
    capsys.readouterr()  # the bar of saving it
    assert prune(dense, tmp_path / "out", "--sparsity", "0.5", *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_broken_features_are_one_line(tmp_path, capsys):
    model = tiny_dinov2(num_channels=1)
    with torch.no_grad():
        # Finite, and their sum is not.
        model.layernorm.weight[:], model.layernorm.bias[:] = 3e38, 3e38
    assert prune(backbone_checkpoint(tmp_path / "dense", model), tmp_path / "out", "--sparsity", "0.5") == 1
    assert "the features of image 0 are NaN or infinite: check the model's weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_whole_clip_keeps_its_tokenizer_all_the_way_to_the_hub(tmp_path):
    dense = clip_checkpoint(tmp_path / "dense")
    there = {path.name for path in (tmp_path / "dense").iterdir()} & set(COMPANIONS)
    assert {"tokenizer.json", "tokenizer_config.json", "processor_config.json"} <= there
    data = image_folder(tmp_path / "data", ("train", "test"), ("",))
    assert prune(tmp_path / "dense", tmp_path / "out", "--sparsity", "0.5", "--dataset_name", str(data)) == 0
    pruned = tmp_path / "out" / "sparsity-0.5"
    small, ready = tmp_path / "small", tmp_path / "ready"
    assert main(["compress", "--model_name_or_path", str(pruned), "--output_dir", str(small)]) == 0
    assert prepare_folder(small, ready, "user/clip").pipeline_tag == "zero-shot-image-classification"
    for folder in (pruned, small, ready):
        for name in there:
            assert (folder / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()
        assert AutoTokenizer.from_pretrained(folder)("a b")["input_ids"] == [48, 0, 1, 49]
        assert isinstance(CLIPProcessor.from_pretrained(folder), CLIPProcessor)
        model = CLIPModel.from_pretrained(folder)
        assert_same_weights(model.text_model, dense.text_model)
        assert int((model.vision_model.encoder.layers[0].mlp.fc1.weight == 0).sum()) > 0
