"""How many removals of each target a budget asks for: losses weighed against costs by a Lagrange multiplier.

Target t loses `L_t(k)` by its k cheapest removals, which is convex as these come in their order, and costs `C_t(k)`
after them. Of the sum of losses the least is looked for whose sum of costs is within the budget. For a multiplier m
each target for itself takes the k with the least `L_t(k) + m C_t(k)`; what all of them give up then is the best that
can be had for what they cost (Everett, Operations Research 11, 1963, theorem 1), and a larger m costs less. Where a
cost falls by the same amount with every removal, k are all removals whose loss is no more than m times that amount: one
threshold for loss / cost in the whole model. Costs that are flat at first, such as the time of a layer that is faster
only beyond some sparsity, are convex nowhere near there: k jumps over them as m grows, so that no m may meet the budget
closely. Therefore the multiplier decides on which piece of its cost each target ends, and another one, with every
target kept to its piece, how far: what a jump saves beyond the budget buys weights back elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cap_hf.budget import CostCurve, Piece
from cap_hf.method.allocation import INFINITY_BITS, Alone, Holders

# Bits of a float32 that tell the buckets of its losses apart: sign, exponent and 7 of the mantissa, to 0.8 %.
DROPPED_BITS = 16
# Halvings of the interval that the multiplier is in, on a logarithmic scale; and its bounds.
HALVINGS, LEAST, MOST = 60, 1e-300, 1e300


@dataclass(frozen=True)
class LossCurve:
    """What the cheapest removals of a target cost together, in buckets of losses that are nearly the same.

    Attributes:
        losses: `(m,)` float64, rising: the mean loss of each bucket's removals.
        counts: `(m + 1,)` int64: removals of the first buckets, of so many as the index says.
        totals: `(m + 1,)` float64: what these cost.
    """

    losses: np.ndarray
    counts: np.ndarray
    totals: np.ndarray

    def count(self, threshold: float) -> int:
        """Return how many removals cost no more than a threshold."""
        return int(self.counts[np.searchsorted(self.losses, threshold, side="right")])

    def total(self, removals: int) -> float:
        """Return what so many of the cheapest removals cost."""
        place = int(np.searchsorted(self.counts, removals)) - 1
        return 0.0 if place < 0 else float(self.totals[place] + (removals - self.counts[place]) * self.losses[place])


def loss_curve(path: torch.Tensor, holders: Holders) -> LossCurve:
    """Return the losses of a target's removals, `(n_blocks, steps)` float32 from `path_losses`, of all holders."""
    buckets = (path.contiguous().view(torch.int32) >> DROPPED_BITS).flatten()
    size = (INFINITY_BITS >> DROPPED_BITS) + 1
    counts = holders.sum(torch.bincount(buckets, minlength=size).cpu()).numpy()
    totals = holders.sum(torch.bincount(buckets, path.flatten().double(), minlength=size).cpu()).numpy()
    there = counts > 0
    counts, totals = counts[there], totals[there]
    # A mean lies in its bucket, but for rounding.
    losses = np.maximum.accumulate(totals / counts)
    return LossCurve(losses, np.append(0, counts.cumsum()), np.append(0.0, totals.cumsum()))


def spend(
    paths: Sequence[torch.Tensor], curves: Sequence[CostCurve], budget: float, holders: Holders | None = None
) -> list[int]:
    """Return how many removals each target makes, of all holders together, so that all cost no more than a budget.

    Args:
        paths: of each target `(n_blocks, steps)` float32 from `path_losses`; what is 0 already goes whatever it saves.
        curves: of each target what it costs.
        budget: for all of them. What cannot be had is left unspent: less than the saving of any removal that could be
            taken back, where no target is held at the end of a piece.
        holders: of the paths; None where they are all here.

    Raises:
        ValueError: not even all removals together meet the budget.
    """
    holders = holders or Alone()
    zeros = holders.sum(torch.stack([(path == 0).sum() for path in paths]).cpu()).tolist()
    if sum(curve.costs[-1] for curve in curves) > budget:
        raise ValueError("the budget is below what is left when all is removed")
    if all(len(curve.costs) == 2 for curve in curves):
        pieces = [curve.pieces()[0]._replace(first=least) for curve, least in zip(curves, zeros, strict=True)]
    else:
        pieces = choose_pieces([loss_curve(path, holders) for path in paths], curves, zeros, budget)
    return spend_exactly(paths, curves, pieces, budget, holders)


def choose_pieces(
    losses: Sequence[LossCurve], curves: Sequence[CostCurve], zeros: Sequence[int], budget: float
) -> list[Piece]:
    """Return the piece of its cost that each target ends on, cut off at the zeros that it has.

    The arguments are those of `spend`, and `zeros` the leading removals of each target that cost nothing.
    """
    pieces = [
        [piece._replace(first=max(piece.first, least)) for piece in curve.pieces() if piece.last >= least]
        for curve, least in zip(curves, zeros, strict=True)
    ]

    def best(multiplier: float) -> list[tuple[Piece, int]]:
        """Return of each target the piece and the removals that are best for a multiplier."""
        found = []
        for loss, curve, own in zip(losses, curves, pieces, strict=True):
            ends = [min(max(loss.count(multiplier * each.slope), each.first), each.last) for each in own]
            values = [loss.total(end) + multiplier * curve.at(end) for end in ends]
            place = values.index(min(values))
            found.append((own[place], ends[place]))
        return found

    def cost(removals: Sequence[int]) -> float:
        return sum(curve.at(count) for curve, count in zip(curves, removals, strict=True))

    if cost([own[0].first for own in pieces]) <= budget:
        return [own[0] for own in pieces]
    low, high = bisect(lambda multiplier: cost([end for _, end in best(multiplier)]) <= budget, LEAST, MOST)
    # On either side of the multiplier at which the budget is met: which of the two loses less, once it is met exactly?
    candidates = [[piece for piece, _ in best(multiplier)] for multiplier in (high, low)]
    candidates = [each for each in candidates if cost([piece.last for piece in each]) <= budget]

    def loses(chosen: Sequence[Piece]) -> float:
        def ends(multiplier: float) -> list[int]:
            return [
                min(max(loss.count(multiplier * piece.slope), piece.first), piece.last)
                for loss, piece in zip(losses, chosen, strict=True)
            ]

        _, enough = bisect(lambda multiplier: cost(ends(multiplier)) <= budget, LEAST, MOST)
        return sum(loss.total(end) for loss, end in zip(losses, ends(enough), strict=True))

    # At a multiplier beyond all losses every target is at the end of its last piece.
    return min(candidates, key=loses, default=[own[-1] for own in pieces])


def bisect(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Return two neighbouring positive numbers, on a logarithmic scale: what holds for all larger ones begins between.

    It is taken to hold for `high`.
    """
    for _ in range(HALVINGS):
        middle = low**0.5 * high**0.5
        if not low < middle < high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def spend_exactly(
    paths: Sequence[torch.Tensor],
    curves: Sequence[CostCurve],
    pieces: Sequence[Piece],
    budget: float,
    holders: Holders,
) -> list[int]:
    """Return how many removals each target makes, each within its piece; exact to the removal.

    The arguments are those of `spend`; the ends of all pieces together meet the budget.
    """
    steepest = max(piece.slope for piece in pieces) or 1.0
    slopes = [piece.slope / steepest for piece in pieces]

    def removals(bits: int) -> list[int]:
        """Return how many removals of each target have no more loss for what they save than a float32 of these bits."""
        multiplier = float(np.int32(bits).view(np.float32))
        # Past the largest loss there is everything; infinity times 0 would be nothing.
        most = float(np.finfo(np.float32).max)
        thresholds = [min(multiplier, most) * slope for slope in slopes]
        counts = [
            torch.searchsorted(path, path.new_full((len(path), 1), threshold), right=True).sum()
            for path, threshold in zip(paths, thresholds, strict=True)
        ]
        found = holders.sum(torch.stack(counts).cpu()).tolist()
        if bits >= INFINITY_BITS:
            found = [piece.last for piece in pieces]
        return [min(max(count, piece.first), piece.last) for count, piece in zip(found, pieces, strict=True)]

    def cost(counts: Sequence[int]) -> float:
        return sum(curve.at(count) for curve, count in zip(curves, counts, strict=True))

    low, high = -1, INFINITY_BITS
    before, after = [piece.first for piece in pieces], removals(high)
    if cost(before) <= budget:
        return before
    while high - low > 1:
        middle = (low + high) // 2
        found = removals(middle)
        if cost(found) <= budget:
            high, after = middle, found
        else:
            low, before = middle, found
    # Of removals that lose the same for what they save only as many are made as it takes, then what came out too low is
    # made up for, by what saves most at first so that little is left.
    order = sorted(range(len(pieces)), key=lambda index: -slopes[index])
    counts = list(before)
    for index in order:
        over, slope = cost(counts) - budget, pieces[index].slope
        if over > 0 and after[index] > counts[index]:
            counts[index] += min(after[index] - counts[index], int(np.ceil(over / slope)) if slope else 0)
    while cost(counts) > budget:
        # What rounding has left of a cost that is no whole number.
        index = next(index for index in order if counts[index] < after[index])
        counts[index] += 1
    for index in order:
        slope = pieces[index].slope
        if slope:
            counts[index] -= min(counts[index] - pieces[index].first, int((budget - cost(counts)) / slope))
    while cost(counts) > budget:
        index = next(index for index in order if counts[index] < pieces[index].last)
        counts[index] += 1
    return counts
