"""A collection that is killed and goes on ends as if it had not been killed; a state of another run is refused."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import build, random_batches
from support.warm import run_forked

import cap_hf.collection.planning as planning_module
import cap_hf.collection.solver as solver_module
import cap_hf.collection.state as state_module
from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.resources import Resources
from cap_hf.collection.shares import largest_shares
from cap_hf.collection.spill import DiskTensors, SpilledSums
from cap_hf.collection.splitting import sums_bytes
from cap_hf.collection.state import Checkpointing, CollectionState
from cap_hf.distributed.processes import Processes
from cap_hf.targets import find_targets

CONFIG = {"num_grads": 32, "fisher_loss": "sampled"}
# Of the bytes of all sums.
FREE = {"one pass": 100, "disk": 0.7, "anew": 0.9, "kept": 1.15, "anew in parts": 0.825, "kept in parts": 0.975}


def squeeze(kind: str) -> None:
    """Let little memory be free for several passes.

    Sums go to the `disk`, or are collected `anew`, from hidden states that are kept too (`kept`); those of some targets
    `in parts`.
    """
    solver_module.BATCH_BYTES = 2**13
    targets = find_targets(build("ViT"))
    total = sum(map(sums_bytes, targets, largest_shares(targets, Processes())))
    free = int(total * FREE[kind])
    planning_module.available_bytes = lambda *_: free
    wanted = ("anew" in kind or "kept" in kind, "kept" in kind)
    planning_module.extra_seconds = lambda plan, *_: float((plan.recollects, plan.keeps) != wanted)


def prune(folder: Path | None, resume: bool = False, config=CONFIG, model=None, sizes=(4,) * 8, seed: int = 0):
    """The weights after a prune, with a state every 8 gradient samples."""
    model = model or build("ViT")
    batches = random_batches(model, 8, sizes=sizes, seed=seed)
    compressor = CAPCompressor(model, CAPConfig(**config), disable_tqdm=True)
    compressor.collect(batches, folder and Checkpointing(folder, 8, resume))
    compressor.prune(0.7)
    compressor.discard_state()
    return {name: value.clone() for name, value in model.state_dict().items()}, compressor.plan


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


def dies_in(owner, name: str, call: int):
    """Let the n-th call of a function be the last."""
    return lambda: setattr(owner, name, die(getattr(owner, name), call))


MOMENTS = {
    "between two saves": dies_in(GradientSums, "step", 6),
    "in a save": dies_in(state_module, "save_file", 17),
    "while the old save goes": dies_in(state_module.shutil, "rmtree", 5),
    "while sums are spilled": dies_in(SpilledSums, "update", 3),
    "in the elimination": dies_in(solver_module.Solver, "eliminate", 3),
    "late in the elimination": dies_in(solver_module.Solver, "eliminate", 10),
    "while new weights are made": dies_in(solver_module.Solver, "reconstruct", 10),
    "between the order and the losses of a target": dies_in(DiskTensors, "__setitem__", 6),
    # The sixth piece is the first of fc2's; of 14 pieces in all two times two are joined.
    "between the order and the losses of a part": dies_in(DiskTensors, "__setitem__", 12),
    "between the order and the losses of joined parts": dies_in(DiskTensors, "__setitem__", 30),
    "while parts go that are joined": dies_in(DiskTensors, "__delitem__", 4),
}


@pytest.fixture
def restore(monkeypatch):
    """Undo `squeeze`."""
    for module, name in (
        (solver_module, "BATCH_BYTES"),
        (planning_module, "available_bytes"),
        (planning_module, "extra_seconds"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.mark.parametrize(
    ("moment", "kind"),
    [
        ("between two saves", "one pass"),
        ("in a save", "one pass"),
        ("in a save", "disk"),
        ("in a save", "anew"),
        ("in a save", "kept"),
        ("while the old save goes", "one pass"),
        ("while the old save goes", "anew"),
        ("while sums are spilled", "disk"),
        ("in the elimination", "one pass"),
        ("in the elimination", "disk"),
        ("in the elimination", "anew"),
        ("in a save", "anew in parts"),
        ("in the elimination", "anew in parts"),
        ("late in the elimination", "kept in parts"),
        ("between the order and the losses of a part", "anew in parts"),
        ("between the order and the losses of joined parts", "anew in parts"),
        ("while parts go that are joined", "anew in parts"),
        ("while new weights are made", "anew in parts"),
        ("late in the elimination", "anew"),
        ("late in the elimination", "kept"),
        ("between the order and the losses of a target", "one pass"),
        ("while new weights are made", "anew"),
        ("while new weights are made", "kept"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, restore, moment, kind):
    folder = tmp_path / "state"
    done = run_forked(Path(__file__), [str(folder), moment, kind], os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert folder.is_dir()
    squeeze(kind)
    steps, eliminated = [], []
    with monkeypatch.context() as patch:
        patch.setattr(GradientSums, "step", noting(steps, GradientSums.step))
        patch.setattr(solver_module.Solver, "eliminate", noting(eliminated, solver_module.Solver.eliminate))
        resumed, plan = prune(folder, resume=True)
        steps_again, eliminated_again = len(steps), len(eliminated)
        expected, _ = prune(None)
    assert (len(plan.passes) > 1) == (kind != "one pass")
    assert (plan.recollects, plan.keeps) == ("anew" in kind or "kept" in kind, "kept" in kind)
    pieces = [target for each in plan.passes for target in each]
    assert (len(pieces) > len(plan.targets)) == ("parts" in kind)
    # Not all was done again.
    assert steps_again < len(steps) - steps_again
    if moment == "in the elimination":
        assert eliminated_again == len(pieces) - 2
    if "elimination" in moment and not plan.recollects:
        assert steps_again == 0
    if moment == "while new weights are made":
        assert eliminated_again == 0
        # But for the pass that the elimination ends with, each is gone through once more.
        assert steps_again == 8 * len(plan.passes)
    assert not folder.exists()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def noting(calls: list, function):
    """The function, which notes that it was called."""

    def noted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return noted


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
        ({"config": CONFIG | {"fisher_block_size": 8}}, "config fisher_block_size differs: auto there, 8 here"),
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


@pytest.mark.parametrize("kind", ["disk", "anew", "kept"])
def test_memory_that_changed_does_not_change_the_passes(tmp_path, monkeypatch, restore, kind):
    folder = tmp_path / "state"
    squeeze(kind)
    interrupted(folder, monkeypatch)
    squeeze("one pass")
    resumed, plan = prune(folder, resume=True)
    assert len(plan.passes) > 1
    assert (plan.recollects, plan.keeps) == (kind in ("anew", "kept"), kind == "kept")
    assert all(torch.equal(value, resumed[name]) for name, value in prune(None)[0].items())
    assert Resources().bytes is None


class Several:
    """What processes tell each other, with the answers of the others made up: all have what `others` says."""

    def __init__(self, rank: int, others: list[int]) -> None:
        self.rank, self.world, self.others = rank, 1 + len(others), others
        self.gathered = 0

    def gather_ints(self, *values: int) -> list[list[int]]:
        self.gathered += 1
        rows = [[0] if len(values) == 1 else [0, other, other] for other in self.others]
        return [*rows[: self.rank], list(values), *rows[self.rank :]]


@pytest.mark.parametrize(("mine", "others"), [(True, [0]), (False, [1]), (True, [1, 0]), (False, [1, 1])])
def test_a_state_of_some_processes_is_refused_by_all(tmp_path, mine, others):
    """Everyone gathers once, whatever it has itself: another collective would meet this one otherwise."""
    folder = tmp_path / "state"
    if mine:
        CollectionState(Checkpointing(folder, 8), Processes(), {}, {})
    else:
        (folder / "rank-9").mkdir(parents=True)
        (folder / state_module.MARK).write_text("{}")
    several = Several(0, others)
    with pytest.raises(CAPError, match=r"has the state of \d of \d processes, or of more: remove it and begin anew"):
        CollectionState(Checkpointing(folder, 8, resume=True), several, {}, {})
    assert several.gathered == 2


def test_a_folder_of_somebody_else_is_refused_and_stays(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CAPError, match="holds something else than a collection's state: choose another --output_dir"):
        prune(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    # What is put there later stays too.
    (folder / "thesis.txt").unlink()
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True)
    compressor.collect(random_batches(model, 8), Checkpointing(folder, 8))
    (folder / "notes.txt").write_text("mine")
    compressor.discard_state()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["", "[]", "{}", "no JSON"])
def test_a_damaged_state_is_one_line(tmp_path, content):
    folder = tmp_path / "state"
    CollectionState(Checkpointing(folder, 8), Processes(), {}, {})
    (folder / "rank-0" / "run.json").write_text(content)
    with pytest.raises(CAPError, match=r"run.json cannot be read: remove .*state and begin anew"):
        CollectionState(Checkpointing(folder, 8, resume=True), Processes(), {}, {})


LIVING = """
import sys
from pathlib import Path
from cap_hf.collection.state import Checkpointing, CollectionState
from cap_hf.distributed.processes import Processes

state = CollectionState(Checkpointing(Path(sys.argv[1]), 8), Processes(), {}, {})
print("there", flush=True)
sys.stdin.read()
state.remove()
"""


def test_a_run_that_lives_keeps_its_folder(tmp_path):
    folder = tmp_path / "state"
    root = Path(__file__).parents[2]
    other = subprocess.Popen(
        [sys.executable, "-c", LIVING, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert other.stdout.readline().strip() == "there"
    for resume in (False, True):
        with pytest.raises(CAPError, match="another run is using .*state: wait for it"):
            CollectionState(Checkpointing(folder, 8, resume), Processes(), {}, {})
    other.communicate(timeout=60)
    assert not folder.exists()
    CollectionState(Checkpointing(folder, 8), Processes(), {}, {}).remove()
    assert not folder.exists()


def test_a_state_of_more_processes_is_not_begun_over(tmp_path):
    folder = tmp_path / "state"
    CollectionState(Checkpointing(folder, 8), Processes(), {}, {})
    (folder / "rank-0").rename(folder / "rank-1")
    with pytest.raises(CAPError, match="go on with --resume, or remove it"):
        CollectionState(Checkpointing(folder, 8), Processes(), {}, {})
    with pytest.raises(CAPError, match="go on with as many as there were"):
        CollectionState(Checkpointing(folder, 8, resume=True), Processes(), {}, {})


@pytest.mark.parametrize(
    ("kind", "owner", "name", "call"),
    [
        ("disk", SpilledSums, "update", 3),
        ("anew", solver_module.Solver, "eliminate", 12),
        ("kept", solver_module.Solver, "eliminate", 12),
    ],
)
def test_other_examples_are_refused_after_a_finished_pass_too(tmp_path, monkeypatch, restore, kind, owner, name, call):
    """A finished pass was taken as it was, and the next one filled from other images."""
    folder = tmp_path / "state"
    squeeze(kind)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt_at(getattr(owner, name), call))
        with pytest.raises(KeyboardInterrupt):
            prune(folder)
    gc.collect()
    with pytest.raises(CAPError, match="the examples differ"):
        prune(folder, resume=True, seed=1)
    resumed, plan = prune(folder, resume=True)
    assert len(plan.passes) > 1
    assert (plan.recollects, plan.keeps) == (kind in ("anew", "kept"), kind == "kept")
    assert all(torch.equal(value, resumed[name]) for name, value in prune(None)[0].items())


def interrupt_at(function, call: int):
    """The function, but its n-th call is interrupted."""
    calls = []

    def interrupted_(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted_


def test_after_the_state_is_gone_nothing_is_pruned(tmp_path):
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True)
    compressor.collect(random_batches(model, 8), Checkpointing(tmp_path / "state", 4))
    compressor.prune(0.5)
    compressor.discard_state()
    with pytest.raises(CAPError, match="call collect"):
        compressor.prune(0.6)


if __name__ == "__main__":
    target, moment, kind = sys.argv[1:]
    squeeze(kind)
    MOMENTS[moment]()
    prune(Path(target))
