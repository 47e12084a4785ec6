"""Sums that are not kept: those of one group of targets are in memory, and others' are collected anew when wanted."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target

if TYPE_CHECKING:
    # Passes go by a plan, which asks the removal paths what they take, and these are loaded by this.
    from cap_hf.collection.passes import Passes


class Recollection:
    """Gives a Fisher the sums of one group of its targets, and takes those of all others from it.

    A group is what one pass collects. To collect it for the elimination, and once more for the new weights, costs
    passes over the examples, and spares what all sums together take on the disk.

    Args:
        passes: that collect the groups.
        sums: of a Fisher, to be filled.
        moments: that its prior is made from, to be filled.
        on_load: told the targets of a group when it is there: what is known of its Fisher has changed.
    """

    def __init__(
        self,
        passes: "Passes",
        sums: dict[str, SymmetricSums],
        moments: dict[str, SymmetricSums],
        on_load: Callable[[Sequence[Target]], None],
    ) -> None:
        self.passes, self.sums, self.moments, self.on_load = passes, sums, moments, on_load
        self._loaded: int | None = None

    @property
    def groups(self) -> Sequence[Sequence[Target]]:
        """Return the targets of each group; of one whose sums are too large for a group, a part."""
        return self.passes.plan.passes

    def load(self, number: int) -> None:
        """Have the sums of a group in memory; on all processes together.

        Raises:
            CAPError: as `Passes.collect`.
        """
        if number == self._loaded:
            return
        # Before others are made: memory holds those of one group.
        self._drop()
        statistic = self.passes.collect(number)
        self.passes.keep(number, statistic)
        self.sums.update(statistic.sums)
        self.moments.update(statistic.moments)
        # Or it would hold them beyond `clear`, until the garbage is collected.
        statistic.clear()
        self._loaded = number
        self.on_load(self.groups[number])

    def is_finished(self, number: int) -> bool:
        """Return whether an interrupted run had all removal paths of a group, and noted it; the same everywhere."""
        return number < self.passes.finished

    def finish(self, number: int) -> None:
        """Note for a run that goes on that the removal paths of a group are there; on all processes together."""
        self.passes.finish(number)

    def clear(self) -> None:
        """Take all sums away, and what was kept to collect them faster."""
        self._drop()
        self.passes.forget()

    def _drop(self) -> None:
        self._loaded = None
        self.sums.clear()
        self.moments.clear()
