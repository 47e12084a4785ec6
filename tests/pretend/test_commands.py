"""The commands on the accelerator, as a user types them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import pretend
from support.commands import without_drops
from support.pretend.runs import command_arguments
from support.recovery import sparse_vit

from cap_hf import CAPError, optimize_for_inference
from cap_hf.commands.main import main


@pytest.fixture
def pruned(tmp_path):
    """What `cap-hf prune` leaves."""
    assert main(command_arguments(tmp_path)) == 0
    return tmp_path / "out"


def read(path):
    return json.loads(path.read_text())


def test_prune_evaluate_and_finetune(pruned, tmp_path):
    report = read(pruned / "report.json")
    assert report["device"] == "pretend"
    sparse = str(pruned / "sparsity-0.75")
    evaluated = ["--model_name_or_path", sparse, "--output_dir", str(tmp_path / "evaluated")]
    assert main(["evaluate", *evaluated, "--max_eval_samples", "50"]) == 0
    metrics = read(tmp_path / "evaluated" / "eval_results.json")["metrics"]
    assert metrics == pytest.approx(without_drops(report["results"][1]["sparse"]))
    arguments = ["--model_name_or_path", sparse, "--teacher_model_name_or_path", str(tmp_path / "dense")]
    arguments += ["--output_dir", str(tmp_path / "recovered"), "--max_train_samples", "64", "--max_eval_samples", "50"]
    arguments += ["--max_steps", "2", "--augmentation", "light", "--ema_decay", "0.9"]
    assert main(["finetune", *arguments]) == 0
    recovered = read(tmp_path / "recovered" / "report.json")
    assert recovered["device"] == "pretend"
    assert recovered["sparsity"] == recovered["sparsity_before"]


def test_prune_gives_the_checkpoint_of_the_cpu(pruned, tmp_path):
    pretend.choose("cpu")
    other = tmp_path / "cpu"
    other.mkdir()
    assert main(command_arguments(other)) == 0
    expected = load_file(other / "out" / "sparsity-0.5" / "model.safetensors")
    for name, weight in load_file(pruned / "sparsity-0.5" / "model.safetensors").items():
        assert torch.equal(weight == 0, expected[name] == 0), name
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-3)


def test_sparse_layers_of_the_cpu_are_refused_in_one_line():
    with pytest.raises(CAPError, match="on the CPU and the model is on pretend"):
        optimize_for_inference(sparse_vit().to("pretend"))
