"""The benchmark that weighs top-1 against time: rows of every form, differences from the dense model, a picture."""

import json

import pytest
from support.launching import dense_checkpoint
from support.scripts import run_script
from transformers import AutoModelForImageClassification

from cap_hf import find_targets


def test_every_form_has_a_row_with_its_difference_and_time(tmp_path, monkeypatch):
    dense = dense_checkpoint(tmp_path / "dense")
    model = AutoModelForImageClassification.from_pretrained(dense)
    for target in find_targets(model):
        target.weight.data[:, : target.weight.shape[1] // 8 * 4] = 0
    model.save_pretrained(tmp_path / "half")
    arguments = ["--model_name_or_path", dense, "--dataset_name", "digits", "--pruned", f"one-shot={tmp_path / 'half'}"]
    arguments += ["--image_sizes", 8, "--batch_sizes", 1, 2, "--max_eval_samples", 40, "--threads", 1, "--runs", 3]
    files = ["--json", tmp_path / "tradeoff.json", "--plot", tmp_path / "tradeoff.png"]
    run_script("benchmarks/tradeoff.py", *arguments, *files, monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / "tradeoff.json").read_text())["results"]
    forms = {(row["family"], row["form"]) for row in rows}
    assert {("dense", "float32"), ("dense", "bfloat16"), ("one-shot", "float32"), ("one-shot", "int8")} <= forms
    assert rows[0]["difference"] == rows[0]["standard_error"] == rows[0]["sparsity"] == 0
    assert 0.4 < rows[-1]["sparsity"] < 0.6
    for row in rows:
        assert row["top1"] - rows[0]["top1"] == pytest.approx(row["difference"], abs=1e-6)
        assert all(row["milliseconds"][size] > 0 for size in ("1", "2"))
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruned", "out/sparsity-0.5"], "--pruned 'out/sparsity-0.5' is no family with its checkpoints"),
        (["--pruned", "healed="], "--pruned 'healed=' is no family"),
        (["--batch_sizes", "1", "0"], r"--batch_sizes \[1, 0\] must be at least 1"),
        (["--runs", "0"], "--runs 0 must be at least 1"),
        ([], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, arguments, message):
    common = ["--model_name_or_path", tmp_path / "nowhere", "--dataset_name", "digits", "--image_sizes", 8]
    files = ["--json", tmp_path / "tradeoff.json", "--plot", tmp_path / "tradeoff.png"]
    with pytest.raises(SystemExit, match=message) as caught:
        run_script("benchmarks/tradeoff.py", *common, *files, *arguments, monkeypatch=monkeypatch)
    assert str(caught.value).startswith("tradeoff.py: ")
    assert "\n" not in str(caught.value)
