"""Memory that looks short, so that a collection takes several passes."""

import pytest
from torch.utils.data import DataLoader

import cap_hf.collection.planning as planning_module
import cap_hf.collection.solver as solver_module
from cap_hf.collection.shares import largest_shares
from cap_hf.collection.splitting import sums_bytes
from cap_hf.distributed.processes import Processes
from cap_hf.targets import find_targets
from support.models import build, random_batches


def sums_of(targets, prior: bool = True) -> int:
    """Bytes of the sums of some targets, in one process."""
    return sum(
        sums_bytes(target, blocks, prior)
        for target, blocks in zip(targets, largest_shares(targets, Processes()), strict=True)
    )


def squeeze(monkeypatch: pytest.MonkeyPatch, fraction: float, anew: bool = False, **sizes) -> None:
    """Let the plan find so much of the Fisher's bytes free, with small chunks beside them.

    What does not fit is collected anew, or goes to the disk, as if that took less time.
    """
    monkeypatch.setattr(solver_module, "BATCH_BYTES", 2**13)
    total = sums_of(find_targets(build("ViT"), **sizes))
    monkeypatch.setattr(planning_module, "available_bytes", lambda *_: int(total * fraction))
    monkeypatch.setattr(planning_module, "extra_seconds", lambda plan, *_: float(plan.recollects != anew))


def loader(model, count: int = 30, **arguments) -> DataLoader:
    """Examples one by one, for a model of three channels."""
    (batch,) = random_batches(model, 8, sizes=(count,))
    return DataLoader([{key: value[i] for key, value in batch.items()} for i in range(count)], **arguments)
