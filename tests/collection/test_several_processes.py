"""Several passes of several processes: whatever they keep, the result is that of one process in one pass."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.latencies import said, spend_budgets
from support.launching import dense_checkpoint, launch

from cap_hf.commands.main import main

# What a launched process runs: the command with little memory.
SCRIPT = """
WAYS = [(False, False), (True, False), (True, True)]
import cap_hf.collection.planning as planning
import cap_hf.collection.solver as solver
from cap_hf.commands.launch import launch

planning.available_bytes = lambda *_: BYTES
planning.extra_seconds = lambda plan, *_: WAYS.index((plan.recollects, plan.keeps))
solver.BATCH_BYTES = 2**13
launch("prune")
"""

# The memory of each process: in one of them passes have parts of layers.
BYTES, FEW_BYTES = 210_000, 186_000


def with_memory(available: int) -> str:
    """The script of processes that have so many bytes each."""
    return f"BYTES = {available}\n{SCRIPT}"


# One process is killed in the last elimination of the first group, which the other one may have done.
KILLED = """
import os, signal
from cap_hf.collection.removal_paths import RemovalPaths

eliminate = RemovalPaths._eliminate

def dying(self, target, advance):
    if self.processes.rank == 1 and target is self.groups[0][-1]:
        os.kill(os.getpid(), signal.SIGKILL)
    eliminate(self, target, advance)

RemovalPaths._eliminate = dying
"""


@pytest.mark.parametrize("available", [BYTES, FEW_BYTES])
def test_they_go_on_from_different_places(tmp_path, available):
    dense = dense_checkpoint(tmp_path / "dense")
    common = ["--model_name_or_path", str(dense), "--sparsity", "0.75", "--num_grads", "40", "--do_eval", "false"]
    common += ["--refit", "false", "--per_device_batch_size", "4", "--spill_dir", "none", "--checkpoint_every", "16"]
    output = ["--output_dir", str(tmp_path / "out")]
    (tmp_path / "script.py").write_text(with_memory(available))
    (tmp_path / "killed.py").write_text(KILLED + with_memory(available))
    launch(2, *common, "--output_dir", str(tmp_path / "expected"), script=tmp_path / "script.py")
    launch(2, *common, *output, script=tmp_path / "killed.py", expect=1)
    state = tmp_path / "out-collection"
    done = [len(list((state / f"rank-{rank}" / "losses").iterdir())) for rank in (0, 1)]
    assert done[0] == done[1] + 1
    passes = json.loads((state / "rank-0" / "run.json").read_text())["plan"]["passes"]
    assert any(isinstance(target, list) for each in passes for target in each) == (available == FEW_BYTES)
    launch(2, *common, *output, "--resume", script=tmp_path / "script.py")
    found, expected = (
        load_file(tmp_path / name / "sparsity-0.75" / "model.safetensors") for name in ("out", "expected")
    )
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not state.exists()


def test_they_spill_or_collect_anew_and_keep_their_state(tmp_path):
    dense = dense_checkpoint(tmp_path / "dense")
    common = ["--model_name_or_path", str(dense), "--sparsity", "0.75", "--num_grads", "40", "--do_eval", "false"]
    # A refit adds up the examples in the order of the processes: its last bits depend on their number.
    common += ["--refit", "false"]
    # Small enough to stay whole in little memory: split batches are rounded otherwise.
    common += ["--per_device_batch_size", "4"]
    assert main(["prune", *common, "--disable_tqdm", "true", "--output_dir", str(tmp_path / "one")]) == 0
    expected = load_file(tmp_path / "one" / "sparsity-0.75" / "model.safetensors")
    nothing = ["--spill_dir", "none"]
    for number, (available, extra) in enumerate(
        (
            (BYTES, ["--spill_dir", str(tmp_path / "spill")]),
            (BYTES, ["--checkpoint_every", "16"]),
            (BYTES, nothing),
            (FEW_BYTES, nothing),
            (BYTES, [*nothing, "--checkpoint_every", "16"]),
        )
    ):
        output = tmp_path / f"two-{number}"
        (tmp_path / "script.py").write_text(with_memory(available))
        done = launch(2, *common, *extra, "--output_dir", str(output), script=tmp_path / "script.py")
        assert "passes over the examples" in done.stderr, done.stderr
        assert "one pass" not in done.stderr
        assert json.loads((output / "report.json").read_text())["num_processes"] == 2
        found = load_file(output / "sparsity-0.75" / "model.safetensors")
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        assert not output.with_name(f"{output.name}-collection").exists()
    assert not any((tmp_path / "spill").iterdir())


# Seconds are told to the first process alone; another one that asks for them fails.
BUDGETS = """
import sys
from accelerate import Accelerator
from safetensors.torch import save_file
from support.latencies import said, spend_budgets
from cap_hf.collection import budgets

def none(*args):
    raise AssertionError("a process that is not the first measures")

accelerator = Accelerator(cpu=True)
said(setattr)
if not accelerator.is_main_process:
    budgets.latency_points = budgets.measure_share = none
save_file(spend_budgets(accelerator), f"{sys.argv[1]}-{accelerator.process_index}.safetensors")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def test_budgets_are_spent_as_by_one_process_and_only_the_first_measures(tmp_path, monkeypatch):
    (tmp_path / "budgets.py").write_text(BUDGETS)
    launch(2, str(tmp_path / "rank"), script=tmp_path / "budgets.py")
    said(monkeypatch.setattr)
    expected = spend_budgets()
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank-{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
