"""One group's sums are in memory at a time, and are collected once more when they are wanted again."""

from types import SimpleNamespace

import pytest
import torch
from support.models import build

from cap_hf.collection.recollection import Recollection
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import find_targets


class Statistic:
    """Sums of some targets, and of their inputs."""

    def __init__(self, targets) -> None:
        device = torch.device("cpu")
        self.sums = {each.name: SymmetricSums.zeros(1, each.block_size, torch.float32, device) for each in targets}
        self.moments = dict(self.sums)

    def clear(self) -> None:
        self.sums, self.moments = {}, {}


class Passes:
    """Passes that collect nothing, and note what they are asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        targets = find_targets(build("ViT"))
        self.plan = SimpleNamespace(passes=[targets[:3], targets[3:5], targets[5:]])
        self.sums, self.moments, self.calls, self.fails_at = {}, {}, [], fails_at
        self.last: Statistic | None = None
        self.forgotten = 0

    def collect(self, number: int) -> Statistic:
        # Whatever was there is gone before memory is taken.
        assert not self.sums
        assert not self.moments
        self.calls.append(number)
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.last = Statistic(self.plan.passes[number])
        return self.last

    def forget(self) -> None:
        self.forgotten += 1

    def keep(self, number: int, statistic: Statistic) -> None:
        assert statistic.sums


def test_loading_takes_the_other_groups_sums_away_first():
    passes, told = Passes(), []
    recollection = Recollection(
        passes, passes.sums, passes.moments, lambda group: told.append([each.name for each in group])
    )
    for number, loaded in ((0, [0]), (0, [0]), (1, [0, 1]), (0, [0, 1, 0])):
        recollection.load(number)
        names = [each.name for each in passes.plan.passes[number]]
        assert passes.calls == loaded
        assert list(passes.sums) == list(passes.moments) == told[-1] == names
        # Nobody else holds them.
        assert passes.last.sums == {}
    assert len(told) == 3
    # What makes the next group faster stays until all are through.
    assert passes.forgotten == 0
    recollection.clear()
    assert passes.sums == passes.moments == {}
    assert passes.forgotten == 1


def test_after_a_pass_that_failed_nothing_counts_as_loaded():
    passes = Passes(fails_at=2)
    recollection = Recollection(passes, passes.sums, passes.moments, lambda group: None)
    recollection.load(0)
    with pytest.raises(KeyboardInterrupt):
        recollection.load(1)
    recollection.load(0)
    assert passes.calls == [0, 1, 0]
