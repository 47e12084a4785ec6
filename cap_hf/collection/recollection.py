"""Sums that are not kept: those of one pass at a time are in memory, another's are collected when they are wanted."""

from collections.abc import Callable, Mapping, Sequence

from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target

# Goes through the examples for the pass of a number: the sums of its targets, and the moments of their inputs.
Collect = Callable[[int], tuple[Mapping[str, SymmetricSums], Mapping[str, SymmetricSums]]]


class Recollection:
    """Gives a Fisher the sums of some of its targets, and takes those of all others from it.

    Collecting them once for the elimination, and once more for the new weights, costs passes over the examples, and
    spares what all sums together take on the disk.

    Args:
        passes: the targets of each.
        sums: of a Fisher, to be filled.
        moments: that its prior is made from, to be filled.
        collect: must give the same for a number every time.
    """

    def __init__(
        self,
        passes: Sequence[Sequence[Target]],
        sums: dict[str, SymmetricSums],
        moments: dict[str, SymmetricSums],
        collect: Collect,
    ) -> None:
        self.passes = [list(each) for each in passes]
        self.sums, self.moments, self.collect = sums, moments, collect
        self._numbers = {target.name: number for number, each in enumerate(passes) for target in each}
        self._loaded: int | None = None

    def load(self, targets: Sequence[Target]) -> None:
        """Have the sums of some targets in memory; on all processes together.

        Args:
            targets: of one pass, at least one.

        Raises:
            CAPError: as `Collection.run`, or the model is not what it was.
        """
        number = self._numbers[targets[0].name]
        if number == self._loaded:
            return
        # Before others are made: memory holds those of one pass.
        self.clear()
        sums, moments = self.collect(number)
        self.sums.update(sums)
        self.moments.update(moments)
        self._loaded = number

    def clear(self) -> None:
        """Take all sums away."""
        self._loaded = None
        self.sums.clear()
        self.moments.clear()
