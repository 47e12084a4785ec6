"""The greedy solver against a brute-force Optimal Brain Surgeon that solves every candidate from scratch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratics import constrained_minimum, fisher_of

from cap_hf.method import elimination, inverses
from cap_hf.method.elimination import decouple, eliminate, eliminate_fisher
from cap_hf.method.inverses import NotInvertibleError, invert, invert_quickly
from cap_hf.method.panels import LostPivotError, eliminate_in_torch, select_symmetric
from cap_hf.method.reconstruction import reconstruct
from cap_hf.patterns import NMPattern


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


def blocks(n: int, size: int, condition: float = 1e2) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and Fishers of a condition number."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -float(np.log10(condition)), size, dtype=torch.float64)
    return torch.randn(n, size, generator=generator, dtype=torch.float64), (basis * values) @ basis.mT


@pytest.fixture(params=["kernels", "PyTorch"])
def kernels(request, monkeypatch):
    if request.param == "PyTorch":
        for module in (elimination, inverses):
            monkeypatch.setattr(module, "has_kernels", lambda *_: False)


@pytest.mark.parametrize("pattern", [None, NMPattern(2, 4)])
def test_in_float32_masks_are_as_good(kernels, pattern):
    """The quadratic loss of what each says to remove, solved for in float64."""
    weights, fisher = blocks(6, 96, condition=1e5)
    exact, found = eliminate(weights, invert(fisher), pattern), eliminate_fisher(weights, fisher, pattern)
    for share in (0.3, 0.6, 0.9) if pattern is None else (1.0,):
        losses = []
        for each in (exact, found):
            count = int(share * each.order.shape[1])
            keep = torch.ones_like(weights, dtype=torch.bool).scatter(1, each.order[:, :count], False)
            change = reconstruct(weights, fisher, keep) - weights
            losses.append((change * (fisher @ change[..., None])[..., 0]).sum(1) / 2)
            torch.testing.assert_close(each.losses[:, :count].sum(1), losses[-1], rtol=1e-2, atol=1e-9)
        assert ((losses[1] - losses[0]) / losses[0]).mean() < 0.01


def test_blocks_that_float32_cannot_invert_are_done_in_float64_and_change_no_other(kernels):
    weights, fisher = blocks(5, 64)
    hard = blocks(5, 64, condition=1e11)[1]
    fisher[1], fisher[4] = hard[1], hard[4]
    found, exact = eliminate_fisher(weights, fisher), eliminate(weights, invert(fisher))
    for block in (1, 4):
        assert torch.equal(found.losses[block], exact.losses[block])
        assert torch.equal(found.order[block], exact.order[block])
    for block in range(5):
        alone = eliminate_fisher(weights[block : block + 1], fisher[block : block + 1])
        assert torch.equal(found.losses[block], alone.losses[0])
        assert torch.equal(found.order[block], alone.order[0])
    # Not everything was.
    assert not torch.equal(found.losses[0], exact.losses[0])


def test_a_pivot_that_float32_loses_is_found_again_in_float64(monkeypatch):
    weights, fisher = blocks(4, 32)
    calls, once = [], elimination.eliminate

    def losing(weights, inverse, pattern=None):
        calls.append((len(weights), weights.dtype))
        if weights.dtype == torch.float32 and len(calls) == 1:
            raise LostPivotError(torch.tensor([False, True, True, False]))
        return once(weights, inverse, pattern)

    monkeypatch.setattr(elimination, "eliminate", losing)
    found = eliminate_fisher(weights, fisher)
    assert calls == [(4, torch.float32), (2, torch.float32), (2, torch.float64)]
    exact = once(weights, invert(fisher))
    for block in (1, 2):
        assert torch.equal(found.losses[block], exact.losses[block])


def test_what_float64_cannot_do_either_names_the_block(kernels):
    weights, fisher = blocks(5, 16)
    fisher[3] = -torch.eye(16, dtype=torch.float64)
    with pytest.raises(NotInvertibleError) as caught:
        eliminate_fisher(weights, fisher)
    assert caught.value.block == 3
    assert caught.value.damp > 1


def test_one_matrix_of_many_blocks_is_inverted_once(kernels):
    weights, fisher = blocks(5, 16)
    shared = fisher[:1].expand(5, -1, -1)
    found, apart = eliminate_fisher(weights, shared), eliminate_fisher(weights, shared.contiguous())
    assert torch.equal(found.losses, apart.losses)
    assert torch.equal(found.order, apart.order)


@pytest.mark.parametrize("size", [32, 128])
def test_what_float32_is_accurate_enough_for_does_not_depend_on_the_other_blocks(kernels, size):
    """At condition numbers where about half of the blocks are."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(48, size // 2, size, generator=generator, dtype=torch.float64)
    fisher = gradients.mT @ gradients / size
    fisher.diagonal(dim1=-2, dim2=-1).add_(torch.logspace(-5, -7.5, 48, dtype=torch.float64)[:, None])
    weights = torch.randn(48, size, generator=generator, dtype=torch.float64)
    ones = torch.ones(48, 1, dtype=torch.float64)
    together = invert_quickly(fisher, ones)[1]
    assert 4 < together.sum() < 44
    alone = [invert_quickly(fisher[block : block + 1], ones[:1])[1] for block in range(48)]
    assert torch.equal(torch.cat(alone), together)
    # A weight that is 0 is alone in its Fisher, and says nothing of the others.
    weights[:, -1] = 0
    decoupled = invert_quickly(decouple(fisher, weights == 0), ones)[1]
    assert (decoupled == together).sum() > 40


def test_a_shared_matrix_that_float32_cannot_invert_is_inverted_once(kernels, monkeypatch):
    weights, fisher = blocks(5, 64, condition=1e11)
    calls, once = [], inverses.invert
    for module in (elimination, inverses):
        monkeypatch.setattr(module, "invert", lambda each: (calls.append(len(each)), once(each))[1])
    found = eliminate_fisher(weights, fisher[:1].expand(5, -1, -1))
    exact = eliminate(weights, invert(fisher[:1]).expand(5, -1, -1))
    # Of five that are one, and of that one.
    assert calls[:2] == [5, 1]
    assert torch.equal(found.losses, exact.losses)


def test_costs_that_overflow_are_lost_pivots_and_no_order():
    weights, fisher = blocks(3, 32)
    with pytest.raises(LostPivotError):
        eliminate_in_torch(weights.float() * 1e19, invert(fisher / 1e3).float())


@pytest.mark.parametrize("times", [2.0**-160, 2.0**160])
@pytest.mark.parametrize("of", ["fisher", "weights"])
def test_units_that_float32_does_not_hold_change_no_digit(kernels, times, of):
    weights, fisher = blocks(4, 32)
    expected = eliminate_fisher(weights, fisher)
    if of == "fisher":
        found, factor = eliminate_fisher(weights, fisher * times), times
    else:
        found, factor = eliminate_fisher(weights * times, fisher), times**2
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.losses, expected.losses * factor)
    assert (found.losses > 0).all()
