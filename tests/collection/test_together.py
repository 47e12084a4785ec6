"""How many sparsities are solved for together: as memory or the disk has room, and the results are those of each."""

from collections import namedtuple

import pytest
import torch
from support.models import build
from support.short_memory import loader, squeeze

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection import together as module
from cap_hf.collection.forecast import Alike
from cap_hf.collection.plan import Plan
from cap_hf.collection.together import SHARE, together
from cap_hf.distributed.processes import Processes
from cap_hf.method.fisher import BlockFisher
from cap_hf.targets import find_targets

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)


def plan_with(free: int, **changes) -> Plan:
    return Plan([[]], "row", 8, 8, available=10**9, needed=10**9 - free, **changes)


@pytest.mark.parametrize("world", [1, 2])
def test_as_many_as_a_share_of_what_is_free_holds(world):
    targets = find_targets(build("ViT"))
    processes = Alike(world, torch.device("cpu"))
    each = sum(4 * target.weight.numel() for target in targets) // world
    for count in (1, 2, 3):
        room = int(count * each / SHARE) + 8
        assert together(plan_with(room), targets, processes, 10) == 1 + count
        assert together(plan_with(room - 16), targets, processes, 10) == count
    assert together(plan_with(10**9), targets, processes, 4) == 4
    # A plan in which nothing is free, or that knows of no memory, has room for one all the same.
    assert together(plan_with(0), targets, processes, 4) == 1
    assert together(Plan([[]], "row", 8, 8), targets, processes, 4) == 1
    assert together(plan_with(0, recollects=True), targets, processes, 4) == 4


def test_on_the_disk_it_is_the_disk_that_counts(monkeypatch, tmp_path):
    targets, usage = find_targets(build("ViT")), namedtuple("usage", "free")
    each = sum(4 * target.weight.numel() for target in targets)
    for free, expected in ((int(2 * each / SHARE) + 8, 3), (0, 1)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda folder, free=free: usage(free))
        assert together(plan_with(0, spilled=1), targets, Processes(), 10, tmp_path) == expected


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_each_is_what_it_is_alone_and_fishers_are_made_once_for_all(monkeypatch, kept):
    if kept == "disk":
        squeeze(monkeypatch, 1.0, block_size="row")
    made, damped = [], BlockFisher.damped
    monkeypatch.setattr(BlockFisher, "damped", lambda *args: (made.append(1), damped(*args))[1])

    def prune(each_alone: bool) -> tuple[list[dict], list[float], int]:
        model, found, losses = build("ViT"), [], []
        compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
        assert bool(compressor.plan.spilled) == (kept == "disk")
        compressor.prune(0.2)
        made.clear()
        reports = map(compressor.prune, SPARSITIES) if each_alone else compressor.prune_each(SPARSITIES)
        for report in reports:
            found.append({name: value.clone() for name, value in model.state_dict().items()})
            losses.append(report.loss)
        return found, losses, len(made)

    alone, together = prune(True), prune(False)
    for one, other in zip(alone[0], together[0], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert together[1] == pytest.approx(alone[1], rel=1e-12)
    assert alone[2] == len(SPARSITIES) * together[2] > 0
