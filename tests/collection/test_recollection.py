"""One pass's sums are in memory at a time, and are collected once more when they are wanted again."""

import pytest
import torch
from support.models import build

from cap_hf.collection.recollection import Recollection
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import find_targets


def test_loading_takes_the_other_passes_sums_away_first():
    targets = find_targets(build("ViT"))
    passes = [targets[:3], targets[3:5], targets[5:]]
    sums, moments, calls = {}, {}, []

    def collect(number: int) -> tuple[dict, dict]:
        # Whatever was there is gone before memory is taken.
        assert not sums
        assert not moments
        calls.append(number)
        made = {
            each.name: SymmetricSums.zeros(1, each.block_size, torch.float32, torch.device("cpu"))
            for each in passes[number]
        }
        return made, dict(made)

    recollection = Recollection(passes, sums, moments, collect)
    for target, loaded in ((targets[0], [0]), (targets[2], [0]), (targets[4], [0, 1]), (targets[1], [0, 1, 0])):
        recollection.load([target])
        assert calls == loaded
        assert list(sums) == list(moments) == [each.name for each in passes[loaded[-1]]]


def test_after_a_pass_that_failed_nothing_counts_as_loaded():
    targets = find_targets(build("ViT"))
    calls = []

    def collect(number: int) -> tuple[dict, dict]:
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {}, {}

    recollection = Recollection([targets[:3], targets[3:]], {}, {}, collect)
    recollection.load(targets[:1])
    with pytest.raises(KeyboardInterrupt):
        recollection.load(targets[3:])
    recollection.load(targets[:1])
    assert calls == [0, 1, 0]
