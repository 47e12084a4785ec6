"""From the Fisher of a target to its removal order, and from a number of removals to its new weights."""

from collections.abc import Callable, Iterator

import torch

from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError
from cap_hf.method.allocation import removed_mask
from cap_hf.method.baselines import rank_scores
from cap_hf.method.elimination import (
    Elimination,
    LostPivotError,
    NotInvertibleError,
    decouple,
    eliminate,
    independent_update,
    invert,
    reconstruct,
)
from cap_hf.method.fisher import BlockFisher
from cap_hf.targets import Target

# Bytes of float64 matrices that are solved at a time: they stay in the cache, and the allocator gives the same memory
# again and again, where larger pieces would come fresh from the system each time.
CHUNK_BYTES = 16 * 2**20
# How many times that many bytes are in use while they are: F, its factor, the inverse and what changes of it.
CHUNK_COPIES = 8


class Solver:
    """Solves this process's blocks of one target after the other.

    Args:
        config: how to prune.
        fisher: None for magnitude.
        damps: of each target, as `fisher.damps` gives them.
    """

    def __init__(self, config: CAPConfig, fisher: BlockFisher | None, damps: dict[str, float]) -> None:
        self.config, self.fisher, self.damps = config, fisher, damps

    def eliminate(self, target: Target, weights: torch.Tensor, advance: Callable[[int], None]) -> Elimination:
        """The order (int16 or int32) and losses (float32) of all removals of some blocks.

        Args:
            target: whose blocks they are.
            weights: of this process's blocks, `(n, B)`.
            advance: told how many blocks are done.

        Raises:
            CAPError: a block cannot be inverted, or its elimination breaks down.
        """
        kind = torch.int16 if target.block_size <= torch.iinfo(torch.int16).max else torch.int32
        parts = []
        for blocks in chunks(target, len(weights)):
            try:
                part = self._eliminate(target, blocks, weights[blocks].double())
            except LostPivotError as error:
                number = self._first(target) + blocks.start + error.block
                raise CAPError(
                    f"rounding destroyed a pivot of {target.name} (block {number}): "
                    f"raise the damp, now {self.config.resolved_damp:g}"
                ) from error
            parts.append(Elimination(part.order.to(kind), part.losses.float()))
            advance(blocks.stop - blocks.start)
        if not parts:
            pattern, size = self.config.pattern, target.block_size
            steps = size if pattern is None else size // pattern.m * (pattern.m - pattern.n)
            return Elimination(weights.new_empty(0, steps, dtype=kind), weights.new_empty(0, steps, dtype=torch.float))
        return Elimination(torch.cat([part.order for part in parts]), torch.cat([part.losses for part in parts]))

    def reconstruct(
        self,
        target: Target,
        weights: torch.Tensor,
        order: torch.Tensor,
        counts: torch.Tensor,
        advance: Callable[[int], None],
    ) -> tuple[torch.Tensor, float | None]:
        """The new weights of some blocks, `(n, B)`, and what the quadratic model says the change costs.

        Args:
            target: whose blocks they are.
            weights: of this process's blocks, `(n, B)`, before pruning.
            order: `(n, steps)` of their removals.
            counts: `(n,)` how many of these happen.
            advance: told how many blocks are done.
        """
        pruned, loss = torch.empty_like(weights), 0.0
        # Blocks with as many survivors are solved together.
        by_count = counts.argsort()
        for chunk in chunks(target, len(weights)):
            blocks = by_count[chunk]
            old = weights[blocks]
            keep = ~removed_mask(order[blocks].long(), counts[blocks], target.block_size) & (old != 0)
            if self.config.method == "magnitude":
                pruned[blocks] = old.masked_fill(~keep, 0.0)
                advance(len(blocks))
                continue
            old = old.double()
            fisher = self.fisher.damped(target, blocks, self.damps[target.name])
            if self.config.weight_update == "joint":
                new = reconstruct(old, fisher, keep)
            elif self.config.weight_update == "independent":
                new = independent_update(old, self._invert(target, blocks, old == 0), keep)
            else:
                new = old.masked_fill(~keep, 0.0)
            pruned[blocks] = new.to(pruned.dtype)
            change = (new - old)[..., None]
            loss += float((change * fisher.bmm(change)).sum() - self.damps[target.name] * change.square().sum()) / 2
            advance(len(blocks))
        return pruned, None if self.config.method == "magnitude" else loss

    def _eliminate(self, target: Target, blocks: slice, weights: torch.Tensor) -> Elimination:
        pattern = self.config.pattern
        if self.config.method == "magnitude":
            return rank_scores(weights.square(), pattern)
        inverse = self._invert(target, blocks, weights == 0)
        if self.config.method == "obs":
            scores = weights.square() / inverse.diagonal(dim1=-2, dim2=-1) / 2
            return rank_scores(scores.masked_fill(weights == 0, -1.0), pattern)
        return eliminate(weights, inverse, pattern)

    def _invert(self, target: Target, blocks: slice | torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The inverse damped Fisher of blocks whose weights marked by `zero` `(n, B)` stay 0."""
        damp = self.damps[target.name]
        try:
            return invert(decouple(self.fisher.damped(target, blocks, damp), zero))
        except NotInvertibleError as error:
            enough = damp + error.damp
            number = self._first(target) + int(torch.arange(target.num_blocks)[blocks][error.block])
            if not self.config.absolute_damp:
                enough *= self.config.resolved_damp / damp
            raise CAPError(
                f"the Fisher of {target.name} (block {number}) cannot be inverted with "
                f"damp={self.config.resolved_damp:g}: --damp {enough:.1e} would do"
            ) from error

    def _first(self, target: Target) -> int:
        """The number of this process's first block."""
        return self.fisher.owned[target.name].start


def chunks(target: Target, count: int) -> Iterator[slice]:
    """`count` blocks of a target as slices of as many as are solved at a time."""
    step = max(1, CHUNK_BYTES // (8 * target.block_size**2))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
