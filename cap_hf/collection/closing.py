"""What is measured, brought to what was asked for: each try is corrected by what was measured of those before."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

# What is measured may be so much, of what was asked for, beside it; and how often it is tried to come so near.
TOLERANCE, MOST_TRIES = 0.01, 6

Found = TypeVar("Found")


@dataclass(frozen=True)
class Try(Generic[Found]):
    """Something that was made for a prediction, and what was measured of it.

    Attributes:
        found: what was made.
        predicted: what it was predicted to take.
        measured: what it takes.
        error: the standard error of that.
    """

    found: Found
    predicted: float
    measured: float
    error: float

    def meets(self, wanted: float) -> bool:
        """Return whether it is what was asked for, as far as can be told."""
        return self.within(wanted) and self.measured >= wanted - self._doubt(wanted)

    def within(self, wanted: float) -> bool:
        """Return whether it takes no more than was asked for, as far as can be told."""
        return self.measured <= wanted + self._doubt(wanted)

    def _doubt(self, wanted: float) -> float:
        return max(TOLERANCE * wanted, self.error)


def close_in(
    attempt: Callable[[float], Try[Found]], wanted: float, known: Sequence[tuple[float, float]]
) -> list[Try[Found]]:
    """Return the tries until one of them meets what is wanted, the last one; or all that are worth making.

    The next prediction is read from the straight line between two points: the least prediction that was measured to
    take as much as is wanted or more, and the next one below that takes less. Its slope is a factor for what is
    predicted, and its height a constant beside it. While all tries end on one side of what is wanted, the point on the
    other side is taken to be ever nearer (the Illinois method: Dowell and Jarratt, BIT 11, 1971).

    Args:
        attempt: makes something that is predicted to take no more than a number, and measures it.
        wanted: what is to be measured.
        known: of some things what is predicted and what is measured; one of them takes as much as is wanted, or more.
    """
    points, in_a_row = list(known), 0
    tries: list[Try[Found]] = []
    for _ in range(MOST_TRIES):
        each = attempt(next_prediction(points, wanted, in_a_row))
        again = any(earlier.predicted == each.predicted for earlier in tries)
        same_side = bool(tries) and (each.measured >= wanted) == (tries[-1].measured >= wanted)
        in_a_row = in_a_row + 1 if same_side else 1
        tries.append(each)
        if each.meets(wanted) or again:
            break
        points.append((each.predicted, each.measured))
    return tries


def next_prediction(points: Sequence[tuple[float, float]], wanted: float, in_a_row: int = 0) -> float:
    """Return what is to be predicted of what takes as much as is wanted, by what others were predicted and measured.

    Args:
        points: of each what was predicted and measured; one of them takes as much as is wanted, or more.
        wanted: what is to be measured.
        in_a_row: how many points at the end lie on the same side of it.
    """
    # By what was predicted: what is predicted to take less may be measured to take more, than the dense model even.
    above = min(point for point in points if point[1] >= wanted)
    below = max((point for point in points if point[1] < wanted and point[0] < above[0]), default=None)
    if below is None:
        return min(predicted for predicted, _ in points)
    low, high = wanted - below[1], above[1] - wanted
    nearer = 0.5 ** max(0, in_a_row - 1)
    if points[-1][1] >= wanted:
        low *= nearer
    else:
        high *= nearer
    return below[0] + low / (low + high) * (above[0] - below[0])


def nearest(tries: Sequence[Try[Found]], wanted: float) -> Try[Found]:
    """Return the try that comes nearest to what is wanted: of those within it, if there are any."""
    within = [each for each in tries if each.within(wanted)]
    return min(within or tries, key=lambda each: abs(each.measured - wanted))
