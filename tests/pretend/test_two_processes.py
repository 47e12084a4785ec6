"""Two processes, each with an accelerator of its own and NCCL's rules between them, give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import build
from support.pretend.runs import CASES, INTERRUPTED, accelerator_on, command_arguments, compress, loader, weights
from support.recovery import assert_same_zeros, sparse_vit, zeros
from transformers import AutoModelForImageClassification

from cap_hf.commands.main import main
from cap_hf.data.evaluation import evaluate_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder that the two processes have left, and what each of their tasks came to."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "support.pretend.two_processes", str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "results.json").read_text())


def outcome(results, name):
    """What a task has left: its tensors and its number."""
    folder, tasks = results
    assert "error" not in tasks[name], tasks[name]["error"]
    tensors = load_file(folder / "tensors.safetensors")
    return {
        key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")
    }, tasks[name]["number"]


@pytest.mark.parametrize("name", CASES)
def test_two_accelerators_give_what_one_gives(name, results):
    found, loss = outcome(results, name)
    compressor, report = compress(name, accelerator_on("pretend"))
    assert loss == pytest.approx(report.loss)
    for key, weight in weights(compressor).items():
        assert torch.equal(found[key] == 0, weight == 0), key
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_collection_goes_on_in_two_processes(name, results):
    expected, loss = outcome(results, name)
    found, again = outcome(results, f"interrupted {name}")
    assert loss == again
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key
    assert not (results[0] / f"{name} state").exists()


def test_saved_once(results):
    folder, _ = results
    outcome(results, "save")
    found, _ = outcome(results, "cap")
    model = AutoModelForImageClassification.from_pretrained(folder / "sparse")
    for name, weight in found.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name


def test_evaluation_gives_what_one_gives(results):
    _, loss = outcome(results, "evaluate")
    accelerator = accelerator_on("pretend")
    model = build("ViT")
    expected = evaluate_model(model, loader(model, 8, examples=22), accelerator, disable_tqdm=True)
    assert loss == pytest.approx(expected["loss"])


@pytest.mark.parametrize(("name", "number"), [("recover", None), ("heal", 48)])
def test_recovery_holds_the_masks(results, name, number):
    found, told = outcome(results, name)
    assert told == number
    model = sparse_vit()
    expected = zeros(model)
    model.load_state_dict(found)
    assert_same_zeros(model, expected)


def test_gradual_pruning_reaches_its_sparsity(results):
    found, _ = outcome(results, "recover gradually")
    model = sparse_vit()
    model.load_state_dict(found)
    counts = [(int(zero.sum()), zero.numel()) for zero in zeros(model).values()]
    assert sum(zero for zero, _ in counts) == round(0.8 * sum(total for _, total in counts))


def test_the_command_gives_what_one_process_gives(results, tmp_path):
    found, _ = outcome(results, "command")
    assert main(command_arguments(tmp_path)) == 0
    expected = load_file(tmp_path / "out" / "sparsity-0.75" / "model.safetensors")
    for name, weight in expected.items():
        # A refit adds up the examples in the order of the processes: its last bits depend on their number.
        assert torch.equal(found[name] == 0, weight == 0), name
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    reports = [json.loads((folder / "out" / "report.json").read_text()) for folder in (results[0], tmp_path)]
    assert [(report["device"], report["num_processes"]) for report in reports] == [("pretend", 2), ("pretend", 1)]
    assert reports[0]["dense"]["loss"] == pytest.approx(reports[1]["dense"]["loss"], rel=1e-5)
