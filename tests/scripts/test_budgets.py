"""The benchmark of budgets: real runs on a tiny model, with seconds that are told."""

import json

import pytest
from support.latencies import said
from support.models import build
from support.scripts import load_script, run_script
from transformers import ViTImageProcessorPil

budgets = load_script("benchmarks/budgets.py")


def test_budgets_of_several_kinds_have_rows_and_a_sparsity_beside_them(tmp_path, monkeypatch, capsys):
    dense, file = tmp_path / "dense", tmp_path / "budgets.json"
    build("Swin", image_size=16, num_channels=1).save_pretrained(dense)
    sides = {"height": 16, "width": 16}
    processor = ViTImageProcessorPil(size=sides, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)
    processor.save_pretrained(dense)
    said(monkeypatch.setattr)
    arguments = ["--model_name_or_path", dense, "--dataset_name", "digits", "--json", file, "--seeds", 3]
    arguments += ["--budget", "flops=0.3", "bytes=0.5", "latency=0.6"]
    fast = ["--num_grads", 16, "--max_eval_samples", 30, "--disable_tqdm", "true", "--fisher_loss", "labels"]
    run_script("benchmarks/budgets.py", *arguments, *fast, monkeypatch=monkeypatch)
    content = json.loads(file.read_text())
    rows = content["results"]
    assert [(row["budget"], row["seed"]) for row in rows] == [
        (budget, 3) for budget in ("flops=0.3", "bytes=0.5", "latency=0.6")
    ]
    for row in rows:
        assert row["achieved"] == pytest.approx(row["asked"], rel=0.01)
        assert row["top1"] == pytest.approx(row["dense"] - row["drop"])
        assert row["num_examples"] == 30
        assert ("gain" in row) == (row["kind"] == "flops")
        assert (row["error"] is None) == (row["kind"] != "latency")
        if row["kind"] == "flops":
            assert row["gain"] == pytest.approx(row["top1"] - row["plain_top1"])
            # The first stage sees more tokens: where weights alone count, more of them go for as many multiply-adds.
            assert row["plain_sparsity"] > row["sparsity"]
            assert 0.295 < row["plain_flops"] <= 0.3
    printed = capsys.readouterr().out
    assert "| flops=0.3 | 0.3000 | - |" in printed
    assert "| latency=0.6 | 0.59" in printed


def test_gains_of_the_table_are_means_with_errors_over_seeds_and_images():
    row = {"budget": "flops=0.4", "seed": 0, "error": None, "predicted": None, "achieved": 0.4, "sparsity": 0.5}
    row |= {"dense": 0.9, "num_examples": 100, "drop": 0.02, "drop_se": 0.01, "plain_sparsity": 0.6}
    row |= {"plain_flops": 0.4, "gain": 0.01, "gain_se": 0.003}
    found = budgets.table([row, row | {"seed": 1, "gain": 0.03, "gain_se": 0.003}])
    # Seeds: half of the squared difference of two over 2; images: 0.3 points.
    assert found.splitlines()[-1].endswith(f"| 2.00 ± {100 * (0.003**2 + 0.0002 / 2) ** 0.5:.2f} |")
