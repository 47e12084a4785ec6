"""The quantisation benchmark: it tells accuracy, sparsity, and targets that lost a zero."""

import copy
import json

import pytest
import torch
from support.inference import make_vit
from support.scripts import load_script, run_script

from cap_hf import CAPCompressor, CAPConfig

quantization = load_script("benchmarks/quantization.py")


def test_lost_zeros_are_named():
    model = make_vit(0.75)
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.vit.layers[1].mlp.fc1.weight
        weight[weight == 0] = 1e-6
    assert quantization.lost_zeros(model, other) == ["vit.layers.1.mlp.fc1"]
    assert quantization.lost_zeros(model, model) == []


def test_zeros_are_counted_by_target():
    model = make_vit(0.75)
    counts = quantization.count_zeros(model)
    weight = model.vit.layers[0].mlp.fc1.weight
    assert counts["vit.layers.0.mlp.fc1"] == (int((weight == 0).sum()), weight.numel())
    assert len(counts) == 12


def test_it_runs_on_a_checkpoint(tiny_checkpoint, tiny_vit, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchao")
    CAPCompressor(tiny_vit, CAPConfig(method="magnitude"), disable_tqdm=True).prune(0.5)
    tiny_vit.save_pretrained(tiny_checkpoint)
    where = tmp_path / "quantization.json"
    run_script(
        "benchmarks/quantization.py",
        *("--json", where, "--model_name_or_path", tiny_checkpoint, "--dataset_name", "digits"),
        monkeypatch=monkeypatch,
    )
    rows = json.loads(where.read_text())["results"]
    assert [row["form"] for row in rows] == ["float32", "int8 weights", "int8 weights and activations"]
    assert all(row["sparsity"] >= 0.5 and row["layers_that_lost_zeros"] == [] for row in rows)
    assert rows[0]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    table = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert len([line for line in table if str(tiny_checkpoint) in line]) == 3
