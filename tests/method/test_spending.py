"""Budgets against all that could be done instead, one by one, and against the bounds of the theory."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cap_hf.budget import CostCurve
from cap_hf.method.allocation import Alone, allocate
from cap_hf.method.spending import loss_curve, spend


def make_paths(rng, shapes, zeros=0.0):
    """Random non-decreasing paths of losses over several magnitudes; some begin with zeros."""
    values = [np.sort(10 ** rng.uniform(-3, 0, shape), axis=1) for shape in shapes]
    return [torch.from_numpy(np.where(np.sort(rng.random(each.shape)) < zeros, 0, each)).float() for each in values]


def linear(paths, prices):
    return [
        CostCurve((0, path.numel()), (float(price * path.numel()), 0.0))
        for path, price in zip(paths, prices, strict=True)
    ]


def jumping(rng, path):
    """Flat at first and steep then, or steep and flat in turns: costs like those of a layer's time, in tens."""
    inner = np.sort(rng.choice(np.arange(1, path.numel()), size=2, replace=False))
    costs = -np.sort(-rng.integers(0, 20, 4))
    costs[1] = costs[0] if rng.random() < 0.5 else costs[1]
    return CostCurve((0, *map(int, inner), path.numel()), tuple(float(10 * cost) for cost in costs))


def cost_of(curves, counts):
    return sum(curve.at(count) for curve, count in zip(curves, counts, strict=True))


def loss_of(paths, counts):
    return sum(
        float(path.flatten().sort().values[:count].double().sum()) for path, count in zip(paths, counts, strict=True)
    )


def best_of_all(paths, curves, budget):
    """The least loss within a budget, of all numbers of removals that there are."""
    totals = [np.append(0, path.double().flatten().sort().values.cumsum(0).numpy()) for path in paths]
    zeros = [int((path == 0).sum()) for path in paths]
    ranges = [range(least, len(total)) for least, total in zip(zeros, totals, strict=True)]
    within = [
        sum(total[count] for total, count in zip(totals, counts, strict=True))
        for counts in itertools.product(*ranges)
        if cost_of(curves, counts) <= budget
    ]
    return min(within)


@given(seed=st.integers(0, 2**31), share=st.floats(0.02, 0.98), zeros=st.sampled_from([0.0, 0.3]))
@settings(max_examples=25, deadline=None)
def test_one_price_per_weight_is_the_best_but_for_less_than_a_weight(seed, share, zeros):
    rng = np.random.default_rng(seed)
    paths = make_paths(rng, [(2, 5), (3, 4), (1, 7)], zeros)
    prices = rng.integers(1, 50, 3).tolist()
    curves = linear(paths, prices)
    budget = share * cost_of(curves, [0, 0, 0])
    counts = spend(paths, curves, budget)
    assert all(int((path == 0).sum()) <= count <= path.numel() for path, count in zip(paths, counts, strict=True))
    cost = cost_of(curves, counts)
    assert cost <= budget
    taken = [price for path, price, count in zip(paths, prices, counts, strict=True) if count > int((path == 0).sum())]
    # Nothing that was taken could have stayed.
    assert budget - cost < min(taken, default=np.inf)
    best = best_of_all(paths, curves, budget)
    # The multiplier, by sorting all removals by what they lose for what they save.
    pairs = zip(paths, prices, strict=True)
    every = sorted((float(loss) / price, price) for path, price in pairs for loss in path.flatten())
    saved = np.cumsum([price for _, price in every])
    multiplier = every[int(np.searchsorted(saved, saved[-1] - budget))][0]
    assert best <= loss_of(paths, counts) * (1 + 1e-6)
    # Everett's bound: the multiplier times what is left unspent, less than a weight before any is taken back.
    assert loss_of(paths, counts) <= best + multiplier * max(prices) * (1 + 1e-6)


@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_at_one_price_for_all_it_is_the_best_and_what_a_count_gives(seed, share):
    rng = np.random.default_rng(seed)
    paths = make_paths(rng, [(2, 4), (3, 3), (1, 8)])
    total = sum(path.numel() for path in paths)
    counts = spend(paths, linear(paths, [7] * 3), 7 * share * total)
    assert sum(counts) == total - int(np.floor(share * total + 1e-9))
    assert counts == [int(each.sum()) for each in allocate([paths], [sum(counts)])[0]]


@pytest.mark.parametrize("seed", range(12))
def test_costs_that_jump_are_met_and_near_the_best(seed):
    rng = np.random.default_rng(seed)
    paths = make_paths(rng, [(2, 5), (3, 4), (1, 7)], zeros=0.2 * (seed % 2))
    curves = [jumping(rng, path) for path in paths]
    dense, least = cost_of(curves, [0, 0, 0]), sum(curve.costs[-1] for curve in curves)
    for share in (0.3, 0.6, 0.9):
        budget = least + share * (dense - least)
        counts = spend(paths, curves, budget)
        assert cost_of(curves, counts) <= budget
        best = best_of_all(paths, curves, budget)
        loss = loss_of(paths, counts)
        assert best <= loss * (1 + 1e-6)
        # What a jump gives away is bounded: by the dearest jump at the multiplier at which it happens.
        assert loss <= best + max(bound(paths, curves, budget) - best, 0) + 1e-2 * best


def bound(paths, curves, budget):
    """The loss of what is feasible on the far side of the best multiplier, by going through very many of them."""
    found = np.inf
    totals = [np.append(0, path.double().flatten().sort().values.cumsum(0).numpy()) for path in paths]
    zeros = [int((path == 0).sum()) for path in paths]
    for multiplier in np.logspace(-6, 2, 500):
        counts = []
        for total, curve, least in zip(totals, curves, zeros, strict=True):
            values = [total[count] + multiplier * curve.at(count) for count in range(least, len(total))]
            counts.append(least + int(np.argmin(values)))
        if cost_of(curves, counts) <= budget:
            found = min(found, loss_of(paths, counts))
    return found


def test_a_target_that_only_gains_when_most_of_it_is_gone_is_pruned_far_or_not_at_all():
    """Two layers alike, of which one has cheaper weights; pruning both half saves nothing."""
    rng = np.random.default_rng(0)
    paths = [torch.from_numpy(np.sort(rng.uniform(0.5, 1, (4, 25)), axis=1)).float() * scale for scale in (1.0, 10.0)]
    curves = [CostCurve((0, 60, 100), (100.0, 100.0, 20.0))] * 2
    counts = spend(paths, curves, 140.0)
    assert counts == [90, 0]


def test_what_cannot_be_met_is_an_error():
    paths = make_paths(np.random.default_rng(0), [(2, 4)])
    with pytest.raises(ValueError, match="below what is left"):
        spend(paths, [CostCurve((0, 8), (10.0, 5.0))], 4.0)


def test_a_model_within_its_budget_gives_up_its_zeros_alone():
    paths = [torch.tensor([[0.0, 0.0, 1.0, 2.0]])]
    assert spend(paths, linear(paths, [3]), 6.0) == [2]
    assert spend(paths, linear(paths, [3]), 9.0) == [2]


def test_a_loss_curve_sums_what_it_is_made_of_to_a_percent():
    (path,) = make_paths(np.random.default_rng(0), [(20, 30)], zeros=0.1)
    curve, every = loss_curve(path, Alone()), path.double().flatten().sort().values
    assert curve.total(path.numel()) == pytest.approx(float(every.sum()))
    for count in (0, 1, 50, 300, 599):
        assert curve.total(count) == pytest.approx(float(every[:count].sum()), rel=1e-2)
    for threshold in (0.0, 0.01, 0.5):
        assert abs(curve.count(threshold) - int((every <= threshold).sum())) <= 6


class Together:
    """Holders in threads of one process, who wait for each other at every sum."""

    def __init__(self, world):
        self.barrier, self.parts = threading.Barrier(world, timeout=60), [None] * world

    def everyone(self, rank, counts):
        self.parts[rank] = counts.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


class Holder:
    def __init__(self, rank, together):
        self.rank, self.together = rank, together

    def sum(self, counts):
        return counts.copy_(sum(self.together.everyone(self.rank, counts)))

    def before(self, counts):
        return sum(self.together.everyone(self.rank, counts)[: self.rank], torch.zeros_like(counts))


@pytest.mark.parametrize("jumps", [False, True])
def test_several_holders_spend_what_one_does(jumps):
    rng = np.random.default_rng(5)
    paths = make_paths(rng, [(4, 6), (6, 5), (2, 9)], zeros=0.2)
    curves = [jumping(rng, path) for path in paths] if jumps else linear(paths, [3, 1, 7])
    budget = 0.5 * (cost_of(curves, [0, 0, 0]) + sum(curve.costs[-1] for curve in curves))
    expected = spend(paths, curves, budget)
    # Of the last target one holder has no block but the first.
    cuts, together = [3, 2, 1], Together(2)
    parts = [[path[:cut] for path, cut in zip(paths, cuts, strict=True)]]
    parts.append([path[cut:] for path, cut in zip(paths, cuts, strict=True)])
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: spend(parts[rank], curves, budget, Holder(rank, together)), range(2)))
    assert found == [expected, expected]
