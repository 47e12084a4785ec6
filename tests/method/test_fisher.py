"""From sums to a damped Fisher."""

import pytest
from support.models import build, random_batches
from support.sums import fill

from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.passes import mean_diagonals
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.fisher import damps_of
from cap_hf.targets import find_targets


def test_dead_blocks_are_named_and_a_dead_target_gets_a_damp(caplog):
    model = build("ViT")
    targets = find_targets(model, include=["vit.layers.0.*"])
    fisher = fill(GradientSums(targets), model, [(random_batches(model, 8)[0], 4, None)])
    fisher.traces(targets[0]).zero_()
    fisher.traces(targets[1])[3] = 0
    found = damps_of(mean_diagonals(fisher, Processes()), 1e-3, absolute=False)
    assert all(damp > 0 for damp in found.values())
    (line,) = caplog.messages
    assert line.startswith("17 blocks have no gradient at all")
    assert line.endswith(f"16 of 16 in {targets[0].name}, 1 of 16 in {targets[1].name}")
    alive = targets[2].name
    mean = fisher.sums[alive].diagonals().double().mean() / 4
    assert found[alive] == pytest.approx(1e-3 * float(mean))
    assert set(damps_of(mean_diagonals(fisher, Processes()), 1e-7, absolute=True).values()) == {1e-7}
    for target in targets:
        fisher.traces(target).zero_()
    caplog.clear()
    with pytest.raises(CAPError, match="all gradients are 0"):
        damps_of(mean_diagonals(fisher, Processes()), 1e-3, absolute=False)
    assert not caplog.messages
