"""A collection that is killed and goes on ends as if it had not been killed; a state of another run is refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import build, random_batches

import cap_hf.collection.plan as plan_module
import cap_hf.collection.solver as solver_module
import cap_hf.collection.state as state_module
from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection.plan import Resources, sums_bytes
from cap_hf.collection.state import Checkpointing
from cap_hf.collection.storage import SpilledSums
from cap_hf.distributed.processes import Processes
from cap_hf.targets import find_targets

CONFIG = {"num_grads": 32, "fisher_type": "sampled"}


def squeeze(passes: bool) -> None:
    """Let little memory be free, so that there are several passes."""
    solver_module.CHUNK_BYTES = 2**13
    total = sum(sums_bytes(target, Processes()) for target in find_targets(build("ViT")))
    plan_module.available_bytes = lambda *_: int(total * (0.7 if passes else 100))


def prune(folder: Path | None, resume: bool = False, config=CONFIG, model=None, sizes=(4,) * 8, seed: int = 0):
    """The weights after a prune, with a state every 8 gradient samples."""
    model = model or build("ViT")
    batches = random_batches(model, 8, sizes=sizes, seed=seed)
    compressor = CAPCompressor(model, CAPConfig(**config), disable_tqdm=True)
    compressor.collect(batches, folder and Checkpointing(folder, 8, resume))
    compressor.prune(0.7)
    compressor.discard_state()
    return {name: value.clone() for name, value in model.state_dict().items()}, len(compressor.plan.passes)


def die(function, call: int):
    """The function, but its n-th call ends with SIGKILL in place of itself."""
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return dying


MOMENTS = {
    "between two saves": lambda: setattr(
        plan_module.fisher.BlockFisher, "_step", die(plan_module.fisher.BlockFisher._step, 6)
    ),
    "in a save": lambda: setattr(state_module, "save_file", die(state_module.save_file, 17)),
    "before a save is put in place": lambda: setattr(state_module.os, "replace", die(os.replace, 5)),
    "while the old save goes": lambda: setattr(state_module.shutil, "rmtree", die(state_module.shutil.rmtree, 5)),
    "while sums are spilled": lambda: setattr(SpilledSums, "write", die(SpilledSums.write, 2)),
    "in the elimination": lambda: setattr(solver_module, "eliminate", die(solver_module.eliminate, 3)),
}


@pytest.fixture
def restore(monkeypatch):
    """Undo `squeeze`."""
    for module, name in (
        (solver_module, "CHUNK_BYTES"),
        (plan_module, "available_bytes"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.mark.parametrize(
    ("moment", "passes"),
    [
        ("between two saves", False),
        ("in a save", False),
        ("before a save is put in place", True),
        ("while the old save goes", False),
        ("while sums are spilled", True),
        ("in the elimination", True),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, restore, moment, passes):
    folder = tmp_path / "state"
    command = [sys.executable, __file__, str(folder), moment, str(int(passes))]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert folder.is_dir()
    squeeze(passes)
    steps = []
    old = plan_module.fisher.BlockFisher._step
    plan_module.fisher.BlockFisher._step = lambda *args: (steps.append(1), old(*args))[1]
    try:
        resumed, count = prune(folder, resume=True)
        saved = len(steps)
        expected, _ = prune(None)
    finally:
        plan_module.fisher.BlockFisher._step = old
    assert (count > 1) == passes
    # Not all was done again.
    assert saved < len(steps) - saved
    assert not folder.exists()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def interrupted(folder: Path, monkeypatch) -> None:
    """Leave the state of a run that ended early."""
    with monkeypatch.context() as patch:

        def fail(*_):
            raise KeyboardInterrupt

        patch.setattr(solver_module.Solver, "eliminate", fail)
        with pytest.raises(KeyboardInterrupt):
            prune(folder)


def test_a_state_of_another_run_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    interrupted(folder, monkeypatch)
    before = sorted(path.name for path in folder.rglob("*"))
    other = build("ViT")
    with torch.no_grad():
        other.classifier.bias[0] += 1
    cases = [
        ({"config": CONFIG | {"seed": 1}}, "config seed differs: 42 there, 1 here"),
        ({"config": CONFIG | {"fisher_block_size": 8}}, "config fisher_block_size differs: row there, 8 here"),
        ({"model": other}, "model weights differs$"),
        ({"seed": 1}, "the examples differ"),
        ({"sizes": (4,) * 7}, "number of examples differs: 8 there, 7 here"),
        ({"sizes": (2, 6, 4, 4, 4, 4, 4, 4)}, "the examples differ"),
    ]
    for changes, message in cases:
        with pytest.raises(CAPError, match=message):
            prune(folder, resume=True, **changes)
        assert sorted(path.name for path in folder.rglob("*")) == before
    with pytest.raises(CAPError, match="go on with --resume"):
        prune(folder)
    resumed, _ = prune(folder, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in prune(None)[0].items())


def test_memory_that_changed_does_not_change_the_passes(tmp_path, monkeypatch, restore):
    folder = tmp_path / "state"
    squeeze(True)
    interrupted(folder, monkeypatch)
    squeeze(False)
    resumed, passes = prune(folder, resume=True)
    assert passes > 1
    assert all(torch.equal(value, resumed[name]) for name, value in prune(None)[0].items())
    assert Resources().bytes is None


if __name__ == "__main__":
    target, moment, several = sys.argv[1:]
    squeeze(bool(int(several)))
    MOMENTS[moment]()
    prune(Path(target))
