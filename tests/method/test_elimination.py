"""The greedy solver against a brute-force Optimal Brain Surgeon that solves every candidate from scratch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratics import constrained_minimum, fisher_of

from cap_hf.config import NMPattern
from cap_hf.method.elimination import (
    LostPivotError,
    NotInvertibleError,
    eliminate,
    invert,
    select_symmetric,
)
from cap_hf.method.reconstruction import reconstruct


def brute_force(weights: np.ndarray, fisher: np.ndarray, pattern: NMPattern | None = None):
    """Greedy removal: at each step try every candidate on the weights as they stand, zeros first."""
    size = len(weights)
    removed: list[int] = []
    current, losses, states = weights.copy(), [], []
    steps = size if pattern is None else size // pattern.m * (pattern.m - pattern.n)
    for _ in range(steps):
        costs = {}
        for entry in set(range(size)) - set(removed):
            if pattern and sum(p // pattern.m == entry // pattern.m for p in removed) == pattern.m - pattern.n:
                continue
            _, loss = constrained_minimum(current, fisher, [*removed, entry])
            costs[entry] = -1.0 if weights[entry] == 0 else loss
        entry = min(costs, key=costs.get)
        losses.append(max(costs[entry], 0.0))
        removed.append(entry)
        current, _ = constrained_minimum(current, fisher, removed)
        states.append(current.copy())
    return removed, losses, states


@pytest.mark.parametrize("kind", ["random", "correlated"])
@pytest.mark.parametrize("pattern", [None, NMPattern(2, 4), NMPattern(1, 3)])
@pytest.mark.parametrize("zeros", [0, 3])
def test_order_losses_and_weights_equal_brute_force(kind, pattern, zeros):
    rng = np.random.default_rng(7)
    size, blocks = 12, 3
    weights = rng.standard_normal((blocks, size))
    weights[:, rng.permutation(size)[:zeros]] = 0.0
    fishers = np.stack([fisher_of(kind, size, rng) for _ in range(blocks)])
    found = eliminate(torch.from_numpy(weights), invert(torch.from_numpy(fishers)), pattern)
    for block in range(blocks):
        order, losses, states = brute_force(weights[block], fishers[block], pattern)
        assert found.order[block].tolist() == order
        np.testing.assert_allclose(found.losses[block].numpy(), losses, rtol=1e-8, atol=1e-14)
        for count, state in enumerate(states, start=1):
            keep = torch.ones(1, size, dtype=torch.bool)
            keep[0, order[:count]] = False
            solved = reconstruct(
                torch.from_numpy(weights[block : block + 1]), torch.from_numpy(fishers[block])[None], keep
            )
            np.testing.assert_allclose(solved[0].numpy(), state, rtol=1e-8, atol=1e-10)


def test_panels_do_not_show():
    """A block of several panels equals a right-looking elimination that carries the whole inverse along."""
    rng = np.random.default_rng(3)
    size = 150
    weights, fisher = rng.standard_normal(size), fisher_of("correlated", size, rng)
    found = eliminate(torch.from_numpy(weights)[None], invert(torch.from_numpy(fisher)[None]))
    inverse, current, left = np.linalg.inv(fisher), weights.copy(), np.ones(size, dtype=bool)
    order, losses = [], []
    for _ in range(size):
        costs = np.where(left, current**2 / np.where(left, np.diag(inverse), 1.0) / 2, np.inf)
        pivot = int(costs.argmin())
        order.append(pivot)
        losses.append(costs[pivot])
        column = inverse[:, pivot].copy()
        current = current - column * current[pivot] / column[pivot]
        inverse = inverse - np.outer(column, column) / column[pivot]
        left[pivot] = False
        current[~left] = 0.0
    assert found.order[0].tolist() == order
    np.testing.assert_allclose(found.losses[0].numpy(), losses, rtol=1e-6)


def test_the_second_of_two_correlated_weights_becomes_dear():
    # Weights 0 and 1 do the same work: once one is gone the other carries it, and a third, middling one goes first.
    fisher = torch.tensor([[[1.0, 0.999, 0.0], [0.999, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0, 1.2]], dtype=torch.float64)
    found = eliminate(weights, invert(fisher))
    assert found.order[0, 1] == 2
    assert found.losses[0, 0] < 0.01 * found.losses[0, 2]


def test_ties_are_each_removed_once():
    weights = torch.ones(2, 8, dtype=torch.float64)
    found = eliminate(weights, torch.eye(8, dtype=torch.float64).expand(2, 8, 8))
    assert sorted(found.order[0].tolist()) == list(range(8))
    assert torch.equal(found.losses, torch.full((2, 8), 0.5, dtype=torch.float64))


@given(seed=st.integers(0, 2**31), groups=st.integers(1, 8), m=st.integers(2, 8), data=st.data())
@settings(max_examples=40, deadline=None)
def test_patterns_hold_in_every_group(seed, groups, m, data):
    pattern = NMPattern(data.draw(st.integers(1, m - 1)), m)
    rng = np.random.default_rng(seed)
    size = groups * m
    weights = rng.standard_normal((2, size)) * (rng.random((2, size)) > 0.3)
    fishers = np.stack([fisher_of("correlated", size, rng) for _ in range(2)])
    found = eliminate(torch.from_numpy(weights), invert(torch.from_numpy(fishers)), pattern)
    assert found.order.shape == (2, groups * (m - pattern.n))
    for row in found.order.tolist():
        assert len(set(row)) == len(row)
        assert np.bincount(np.asarray(row) // m, minlength=groups).tolist() == [m - pattern.n] * groups


def test_select_symmetric_is_a_gather():
    matrices = torch.randn(3, 9, 9)
    matrices = matrices + matrices.mT
    index = torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    expected = torch.stack([matrix[i][:, i] for matrix, i in zip(matrices, index, strict=True)])
    assert torch.equal(select_symmetric(matrices, index), expected)
    # In place of its own matrices, as the solver uses it.
    assert torch.equal(select_symmetric(matrices, index, matrices.new_empty(243), matrices.flatten()), expected)


def test_singular_fisher_names_a_damp_that_does():
    fisher = torch.ones(1, 4, 4, dtype=torch.float64)
    fisher[0, 0, 0] -= 0.5
    with pytest.raises(NotInvertibleError) as caught:
        invert(fisher)
    assert caught.value.block == 0
    inverse = invert(fisher + caught.value.damp * torch.eye(4, dtype=torch.float64))
    assert inverse.isfinite().all()


def test_lost_pivot_is_an_error_not_a_nan():
    inverse = torch.eye(3, dtype=torch.float64)[None].clone()
    inverse[0, 1, 1] = -1.0
    with pytest.raises(LostPivotError) as caught:
        eliminate(torch.ones(1, 3, dtype=torch.float64), inverse)
    assert caught.value.block == 0
