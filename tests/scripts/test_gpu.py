"""The GPU's benchmark: all of it runs in a tiny form on any device; with a GPU its results are the CPU's."""

import json

import pytest
import torch
from support.gpu import needs_gpu
from support.scripts import load_script, run_script

from cap_hf import CAPError

gpu = load_script("benchmarks/gpu.py")
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=needs_gpu)]


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small are faster on one thread, by far where other programs use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_of_the_tiny_form_is_measured(device, tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    run_script("benchmarks/gpu.py", "--tiny", "--device", device, "--json", path, monkeypatch=monkeypatch)
    rows = json.loads(path.read_text())["results"]
    parts = {part: [row for row in rows if row["part"] == part] for part in gpu.PARTS}
    assert [len(parts[part]) for part in gpu.PARTS] == [len(gpu.CHECKS) + 2, 3 + 6, 3, 3]
    assert not any("failed" in row for row in rows)
    # On the CPU both sides are the same computation; on a GPU rounding differs.
    least = 1.0 if device == "cpu" else 0.98
    assert all(row["mask_agreement"] >= least for row in parts["check"][:-2])
    assert parts["check"][-2]["fused"] == (device == "cuda")
    eliminations = [row for row in parts["rate"] if row["name"] == "elimination"]
    assert [(row["block_size"], row["blocks"]) for row in eliminations] == [(64, 4 * 64 + 128), (128, 64)]
    assert all(rate > 0 for row in eliminations for rate in row["share_of_peak"])
    assert all(row["layers"] == 2 and row["sparsity"] == 0.75 for row in parts["prune"])
    assert [row["batch_size"] for row in parts["inference"]] == [1, 8, 64]
    assert all(row["logits_difference"] < 0.05 for row in parts["inference"])


def test_a_row_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    arguments = ["--tiny", "--device", "cpu", "--json", path, "--only", "prune", "inference", "--max_memory", "1KB"]
    with pytest.raises(SystemExit, match="3 of 6 rows failed:\nprune: vit-test: "):
        run_script("benchmarks/gpu.py", *arguments, monkeypatch=monkeypatch)
    rows = json.loads(path.read_text())["results"]
    assert ["failed" in row for row in rows] == [True] * 3 + [False] * 3


def test_a_model_that_is_too_large_is_pruned_in_part(monkeypatch):
    asked = []

    def prune_layers(vit, layers, args):
        asked.append(layers)
        if layers > 3:
            raise CAPError("too little memory")
        return {"layers": layers}

    monkeypatch.setattr(gpu, "prune_layers", prune_layers)
    row = gpu.prune_whole("vit-base", gpu.argparse.Namespace(layers=12))
    assert row == {"layers": 3, "refused": {"12 layers": "too little memory", "6 layers": "too little memory"}}
    assert asked == [12, 6, 3]


def test_without_a_gpu_only_the_tiny_form_runs(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--tiny"):
        run_script("benchmarks/gpu.py", "--device", "cpu", "--json", tmp_path / "x.json", monkeypatch=monkeypatch)
    assert not (tmp_path / "x.json").exists()
