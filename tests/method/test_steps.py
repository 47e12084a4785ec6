"""What goes at each step: units against solves from scratch."""

import numpy as np
import pytest
import torch
from support.quadratics import constrained_minimum, fisher_of, inverse_of

from cap_hf.kernels.build import load_extension
from cap_hf.method.elimination import decouple, eliminate, eliminate_fisher
from cap_hf.method.panels import eliminate_in_torch
from cap_hf.method.steps import unit_costs
from cap_hf.patterns import BlockPattern


def brute_force(weights: np.ndarray, fisher: np.ndarray, unit: int):
    """Greedy removal of units: at each step every one that is left is tried, solved from scratch; zeros go first."""
    removed, losses, spent = [], [], 0.0
    units = {first: list(range(first, first + unit)) for first in range(0, len(weights), unit)}
    dead = [entry for entry in range(len(weights)) if weights[entry] == 0]
    while units:
        costs = {}
        for first, members in units.items():
            _, loss = constrained_minimum(weights, fisher, sorted({*dead, *removed, *members}))
            costs[first] = -1.0 if not weights[members].any() else loss
        first = min(costs, key=costs.get)
        removed += units.pop(first)
        total = max(costs[first], spent)
        losses.append(total - spent)
        spent = total
        yield first // unit, losses[-1]


def blocks(size: int, kind: str):
    rng = np.random.default_rng(size)
    weights = rng.standard_normal((3, size))
    # A unit of zeros, and a zero beside other weights.
    weights[1, :8] = 0.0
    weights[2, 5] = 0.0
    return weights, np.stack([fisher_of(kind, size, rng) for _ in range(3)])


@pytest.mark.parametrize("unit", [2, 4, 8])
@pytest.mark.parametrize("kind", ["random", "correlated", "identity"])
@pytest.mark.parametrize("solve", [eliminate, eliminate_in_torch])
def test_units_go_as_in_brute_force(solve, kind, unit):
    weights, fisher = blocks(24, kind)
    w, f = torch.from_numpy(weights), torch.from_numpy(fisher)
    found = solve(w, inverse_of(decouple(f.clone(), w == 0)), BlockPattern(unit))
    for block in range(3):
        expected = list(brute_force(weights[block], fisher[block], unit))
        assert found.order[block].tolist() == [first for first, _ in expected]
        np.testing.assert_allclose(found.losses[block], [loss for _, loss in expected], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("unit", [2, 4, 8])
@pytest.mark.parametrize("size", [8, 72, 136, 200])
def test_the_kernel_removes_what_pytorch_does_over_several_panels(size, unit):
    assert load_extension("elimination"), "no C++ compiler: the kernels cannot be tested"
    weights, fisher = blocks(size, "correlated")
    w, f = torch.from_numpy(weights), torch.from_numpy(fisher)
    inverse = inverse_of(decouple(f.clone(), w == 0))
    found, expected = eliminate(w, inverse, BlockPattern(unit)), eliminate_in_torch(w, inverse, BlockPattern(unit))
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-7, atol=1e-12)
    quick = eliminate_fisher(w, decouple(f, w == 0), BlockPattern(unit))
    assert torch.equal(quick.order.sort().values, expected.order.sort().values)
    # All that a block loses, whatever the order: in float32 with condition numbers of 10^5.
    torch.testing.assert_close(quick.losses.sum(dim=1), expected.losses.sum(dim=1), rtol=1e-2, atol=1e-6)


def test_a_unit_costs_what_its_own_quadratic_says():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(5, 3, 4, 6, generator=generator, dtype=torch.float64)
    inverse, weights = roots @ roots.mT, torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    kept = weights.clone(), inverse.clone()
    expected = torch.einsum("...i,...ij,...j", weights, inverse_of(inverse), weights)
    torch.testing.assert_close(unit_costs(weights, inverse), expected)
    assert torch.equal(weights, kept[0])
    assert torch.equal(inverse, kept[1])
