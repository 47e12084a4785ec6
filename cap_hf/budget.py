"""Budgets: what a pruned model may cost, in the place of a sparsity, and how a weight's cost falls as it is pruned."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from cap_hf.errors import CAPError

# What each kind is a share of, as messages and tables say it.
KINDS = {
    "flops": "the targets' multiply-adds",
    "bytes": "the dense bytes of its weights, compressed",
    "latency": "the dense latency here, with sparse float32 layers",
    "latency-int8": "the dense latency here, with int8 layers",
}


@dataclass(frozen=True)
class Budget:
    """A share of what the dense model costs, which a pruned model may cost at most.

    Args:
        kind: one of `KINDS`.
            flops: multiply-adds of the targets on one image; a weight costs one for every token or position that it is
                multiplied with.
            bytes: of all weights as `cap-hf compress` stores them, bit for bit.
            latency: seconds that one image takes on this machine's CPU after `optimize_for_inference`; latency-int8:
                after `optimize_for_inference(dtype="int8")`.
        share: in (0, 1).
        example_inputs: one image as the model takes it, which positions are counted and seconds measured on; None for
            one of the size that the image processor beside the checkpoint says, or the config.

    Raises:
        CAPError: there is no such kind, or the share is no number in (0, 1).
    """

    kind: str
    share: float
    example_inputs: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CAPError(f"budget {self.kind!r} is none of {', '.join(KINDS)}")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float):
            raise CAPError(f"budget {self.kind}={self.share!r:.80} is no number: pass such as {self.kind}=0.5")
        if not 0 < self.share < 1:
            raise CAPError(f"budget {self} is not between 0 and 1: it is a share of what the dense model costs")

    @property
    def is_latency(self) -> bool:
        """Return whether it is one of time."""
        return self.kind.startswith("latency")

    def __format__(self, spec: str) -> str:
        """Return it as it is typed, the share in the form that is asked for, as a sparsity would be."""
        return f"{self.kind}={self.share:{spec or 'g'}}"

    def __str__(self) -> str:
        return format(self)

    def check(self, allocation: str, selection: str) -> None:
        """Raise a CAPError unless an allocation and a selection leave it to a budget which weights go."""
        if allocation != "global":
            raise CAPError(f"allocation={allocation} says how much each target keeps: it does not go with {self}")
        if selection != "marginal":
            raise CAPError(f"selection={selection} has no loss of a single removal to weigh: leave it out with {self}")


def parse_budgets(texts: Sequence[str]) -> list[Budget]:
    """Return the budgets that texts such as `flops=0.4` stand for, the largest first, each once.

    Raises:
        CAPError: one is no budget, or they are of several kinds.
    """
    budgets = []
    for text in texts:
        kind, _, share = text.partition("=")
        try:
            number = float(share)
        except ValueError:
            known = ", ".join(KINDS)
            raise CAPError(f"budget {text!r:.80} is no KIND=SHARE such as flops=0.4; kinds are {known}") from None
        # Closer than this, two would share a folder.
        budgets.append(Budget(kind, round(number, 12)))
    kinds = list(dict.fromkeys(budget.kind for budget in budgets))
    if len(kinds) > 1:
        raise CAPError(
            f"budgets of {' and '.join(kinds)} are for a run each: several of one kind give a checkpoint each"
        )
    return sorted(dict.fromkeys(budgets), key=lambda budget: -budget.share)


class Piece(NamedTuple):
    """Where a curve is linear: from `first` to `last` removals, each of which saves `slope`."""

    first: int
    last: int
    slope: float


@dataclass(frozen=True)
class CostCurve:
    """What a target costs after so many removals: linear between points, and never rising.

    Attributes:
        removals: rising whole numbers of units, from 0 to all that the target has.
        costs: of each, in whatever a budget is counted in.
    """

    removals: tuple[int, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        rises = any(after > before for before, after in pairwise(self.costs))
        if self.removals[0] != 0 or list(self.removals) != sorted(set(self.removals)) or rises:
            raise ValueError("a curve's removals begin with 0 and rise, and its costs do not")

    def at(self, removed: int) -> float:
        """Return the cost after so many removals, no more than there are."""
        place = max(1, bisect_left(self.removals, removed))
        piece = self.pieces()[place - 1]
        # In this order what falls by whole numbers stays whole.
        return self.costs[place] + piece.slope * (piece.last - removed)

    def pieces(self) -> list[Piece]:
        """Return where it is linear, from its beginning on."""
        points = list(zip(self.removals, self.costs, strict=True))
        return [
            Piece(first, last, (before - after) / (last - first)) for (first, before), (last, after) in pairwise(points)
        ]


def curve_of(points: Sequence[tuple[int, float]]) -> CostCurve:
    """Return the curve through some points."""
    return CostCurve(tuple(int(removed) for removed, _ in points), tuple(float(cost) for _, cost in points))


def corrected(curves: Sequence[CostCurve], empty: float) -> list[CostCurve]:
    """Return seconds of layers that add up to what was measured with nothing left in them.

    What is measured beside the prediction comes to each layer by its dense seconds, once it is not as it is dense: a
    sparse layer also saves some of what the model does beside it, such as a GELU that it ends with, and may so take
    less than nothing.

    Args:
        curves: as they were predicted.
        empty: what all layers together were measured to take without any weight.
    """
    changed = sum(curve.costs[0] for curve in curves if curve.costs[-1] < curve.costs[0])
    share = (empty - sum(curve.costs[-1] for curve in curves)) / changed if changed else 0.0
    return [
        CostCurve(
            curve.removals,
            tuple(
                cost if cost == curve.costs[0] else min(curve.costs[0], cost + share * curve.costs[0])
                for cost in curve.costs
            ),
        )
        for curve in curves
    ]
