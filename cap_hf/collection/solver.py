"""From the Fisher of a target to its removal order, and from a number of removals to its new weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError
from cap_hf.method.allocation import removal_turns
from cap_hf.method.fisher import BlockFisher
from cap_hf.method.inverses import NotInvertibleError
from cap_hf.method.methods import METHODS
from cap_hf.method.panels import Elimination, LostPivotError, num_steps
from cap_hf.patterns import Pattern, unit_of
from cap_hf.targets import Target

# Bytes of float64 matrices that are solved at a time. On a CPU they stay in the cache, and the allocator gives the same
# memory again and again, where larger batches would come fresh from the system each time. Elsewhere the first is what a
# plan leaves room for, and the second the most that a batch takes of what is free all the same: an elimination has as
# many steps however many blocks a batch has, and each of these keeps one multiprocessor of a GPU busy.
BATCH_BYTES, DEVICE_BATCH_BYTES, MOST_DEVICE_BYTES = 16 * 2**20, 2**28, 2**31
# How many times that many bytes are in use while they are: F, its factor, the inverse and what changes of it.
COPIES = 8


class Solver:
    """Solves this process's blocks of one target after the other.

    Args:
        config: how to prune.
        fisher: None where the method sums nothing.
        batch_bytes: of matrices that are solved at a time; None for the default of a device.
    """

    def __init__(self, config: CAPConfig, fisher: BlockFisher | None, batch_bytes: int | None = None) -> None:
        self.config, self.method, self.fisher = config, METHODS[config.method], fisher
        self.batch_bytes = batch_bytes

    def has_damp(self, target: Target) -> bool:
        """Return whether it is known what a target is damped with, as it must be where its blocks are solved."""
        return self.fisher is None or target.name in self.fisher.damps

    def eliminate(
        self, target: Target, weights: torch.Tensor, pattern: Pattern | None, advance: Callable[[int, float], None]
    ) -> Elimination:
        """Return the order (int16 or int32) and losses (float32) of all removals of some blocks.

        Args:
            target: whose blocks they are.
            weights: of this process's blocks, `(n, B)`.
            pattern: N:M, blocks, or None.
            advance: told how many blocks are done, and how much work that was.

        Raises:
            CAPError: a block cannot be inverted, or its elimination breaks down.
        """
        kind = order_dtype(target)
        steps = num_steps(target.block_size, pattern)
        order = weights.new_empty(len(weights), steps, dtype=kind)
        losses = weights.new_empty(len(weights), steps, dtype=torch.float32)
        for blocks in self._batches(target, len(weights)):
            with self._explained(target, blocks):
                part = self.method.eliminate(weights[blocks].double(), self._damped(target, blocks), pattern)
            order[blocks], losses[blocks] = part.order, part.losses
            advance(blocks.stop - blocks.start, work_of(target, blocks.stop - blocks.start))
        self._release()
        return Elimination(order, losses)

    def reconstruct(
        self,
        target: Target,
        weights: torch.Tensor,
        paths: Elimination,
        counts: Sequence[torch.Tensor],
        pattern: Pattern | None,
        advance: Callable[[int, float], None],
    ) -> list[tuple[torch.Tensor, float]]:
        """Return the new weights of some blocks, `(n, B)`, and what the quadratic model says that the change costs.

        Each batch of Fishers is made and factorised once, however many times there are; the weights of one time do not
        depend on the others (see `reconstruct_each`).

        Args:
            target: whose blocks they are.
            weights: of this process's blocks, `(n, B)`, before pruning.
            paths: `(n, steps)` order and losses of their removals.
            counts: for each time `(n,)` how many of these happen.
            pattern: that the order was found for.
            advance: told how many blocks are done, and how much work that was.

        Returns:
            Both for each time; the cost is 0 where there is no Fisher.

        Raises:
            CAPError: a block cannot be inverted.
        """
        pruned, losses = [torch.empty_like(weights) for _ in counts], [0.0] * len(counts)
        damp = 0.0 if self.fisher is None else self.fisher.damps[target.name]
        each = torch.stack(list(counts))
        # Blocks with about as many survivors are solved together, whatever the counts: those with alike losses.
        alike = paths.losses[:, paths.losses.shape[1] // 2].argsort(stable=True)
        for batch in self._batches(target, len(weights), len(counts)):
            blocks = alike[batch]
            old, order = weights[blocks].double(), paths.order[blocks].long()
            fisher = self._damped(target, blocks)
            turns = removal_turns(order, target.block_size, unit_of(pattern)).masked_fill_(old == 0, -1)
            with self._explained(target, blocks):
                new = self.method.reconstruct(old, fisher, turns, each[:, blocks], self.config.weight_update)
            for whole, part in zip(pruned, new, strict=True):
                whole[blocks] = part.to(weights.dtype)
            if fisher is not None:
                changes = (new - old).transpose(0, 1)
                costs = (changes * products(fisher, changes)).sum((0, 2)) - damp * changes.square().sum((0, 2))
                losses = [loss + cost / 2 for loss, cost in zip(losses, costs.tolist(), strict=True)]
            advance(len(blocks) * len(counts), work_of(target, len(blocks) * len(counts)))
        self._release()
        return list(zip(pruned, losses, strict=True))

    def _batches(self, target: Target, count: int, times: int = 0) -> Iterator[slice]:
        """Yield `count` blocks of a target as slices of as many as are solved at a time, for so many times."""
        size = self.batch_bytes or default_batch_bytes(target.weight.device)
        shared = self.fisher is None or len(self.fisher.sums[target.name]) == 1
        entries = target.block_size ** (1 if shared and not self.method.inverts else 2)
        # Of small blocks the new weights of all times are more than the Fishers.
        entries += times * target.block_size
        step = max(1, size // (8 * entries))
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def _release(self) -> None:
        if self.fisher is not None:
            self.fisher.release()

    def _damped(self, target: Target, blocks: slice | torch.Tensor) -> torch.Tensor | None:
        return None if self.fisher is None else self.fisher.damped(target, blocks)

    @contextmanager
    def _explained(self, target: Target, blocks: slice | torch.Tensor) -> Iterator[None]:
        """Turn what a batch of blocks cannot be solved for into a CAPError that names the block."""
        if self.fisher is None:  # nothing is inverted
            yield
            return
        damp, absolute = self.method.damp(self.config), self.fisher.damps[target.name]
        first = self.fisher.owned[target.name].start
        try:
            yield
        except LostPivotError as error:
            raise CAPError(
                f"rounding destroyed a pivot of {target.name} (block {first + place_of(blocks, error.block)}): "
                f"raise the damp, now {damp:g}"
            ) from error
        except NotInvertibleError as error:
            enough = absolute + error.damp
            if not self.config.absolute_damp:
                enough *= damp / absolute
            raise CAPError(
                f"the Fisher of {target.name} (block {first + place_of(blocks, error.block)}) cannot be inverted "
                f"with damp={damp:g}: --damp {enough:.1e} would do"
            ) from error


def products(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return each of the symmetric matrices `(n, B, B)` times its vectors, of `(n, times, B)`."""
    if matrices.stride(0) == 0:  # one matrix, expanded
        return vectors @ matrices[0]
    return vectors.bmm(matrices)


def place_of(blocks: slice | torch.Tensor, index: int) -> int:
    """Return where among the owned blocks of a target the `index`-th of a batch of them is."""
    return blocks.start + index if isinstance(blocks, slice) else int(blocks[index])


def order_dtype(target: Target) -> torch.dtype:
    """Return the smallest dtype that holds a position in a block."""
    return torch.int16 if target.block_size <= torch.iinfo(torch.int16).max else torch.int32


def work_of(target: Target, blocks: int) -> float:
    """Return what blocks of a target take to solve, in multiplications but for a factor."""
    return blocks * float(target.block_size) ** 3


def default_batch_bytes(device: torch.device) -> int:
    """Return the bytes of matrices that are solved at a time where no plan says it."""
    return BATCH_BYTES if device.type == "cpu" else DEVICE_BATCH_BYTES


def batch_range(targets: Sequence[Target], device: torch.device, available: int) -> tuple[int, int]:
    """Return the least and the most bytes of matrices that a plan solves at a time, if its memory allows them.

    Args:
        targets: that are pruned.
        device: that they are on.
        available: bytes.
    """
    # The least, and on a CPU the most, are to be no large part of the memory.
    part = available // 4 // COPIES
    if device.type != "cpu":
        return min(DEVICE_BATCH_BYTES, part), MOST_DEVICE_BYTES
    # A block for each thread: a thread does whole blocks.
    every = torch.get_num_threads() * max(8 * target.block_size**2 for target in targets)
    return BATCH_BYTES, max(BATCH_BYTES, min(every, part))


def peak_bytes(targets: Sequence[Target], batch_bytes: int) -> int:
    """Return the most bytes in use while batches of so many bytes, or of a single larger block, are solved."""
    return COPIES * max(batch_bytes, *(8 * target.block_size**2 for target in targets))
