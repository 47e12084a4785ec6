"""How many weights each block gives up: global, uniform, N:M. Exact to the weight, ties included."""

from collections.abc import Sequence
from typing import Protocol

import torch

# Losses are compared as float32: non-negative floats order like the integers that their bits spell.
TINY = torch.finfo(torch.float32).tiny
INFINITY_BITS = 0x7F800000


class Holders(Protocol):
    """Those who hold the paths of a target's blocks, each of consecutive ones; all tell the others counts alone."""

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the sum of everybody's counts, int64."""

    def before(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the sum of the counts of those who hold earlier blocks, int64."""


class Alone:
    """One holder of all paths."""

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the counts: there are no others."""
        return counts

    def before(self, counts: torch.Tensor) -> torch.Tensor:
        """Return 0: nobody holds earlier blocks."""
        return torch.zeros_like(counts)


def path_losses(losses: torch.Tensor, zeros: torch.Tensor, selection: str) -> torch.Tensor:
    """Return what a block's k-th removal is compared by, non-decreasing in k (arXiv 2210.09223, section 3).

    Args:
        losses: `(n, steps)` loss of each single removal, in the order of removal.
        zeros: `(n,)` how many leading removals were weights that are 0 already; they get exactly 0, all others
            more, so that a tie can never spend a removal on a weight while a zero is left.
        selection: 'marginal' (running maximum of the losses) or 'cumulative' (their running sum, as published).
    """
    path = losses.double()
    path = path.cummax(dim=1).values if selection == "marginal" else path.clamp_min(0).cumsum(dim=1)
    path = path.clamp(TINY, torch.finfo(torch.float32).max).float()
    steps = torch.arange(losses.shape[1], device=losses.device)
    return path.masked_fill_(steps < zeros[:, None], 0.0)


def allocate(
    groups: Sequence[Sequence[torch.Tensor]], quotas: Sequence[int], holders: Holders | None = None
) -> list[list[torch.Tensor]]:
    """Take in each group of targets so many of the cheapest removals.

    Of removals that cost the same those of the earlier target go first, then those of the earlier block.

    Args:
        groups: of targets, each `(n_blocks, steps)` float32 from `path_losses`.
        quotas: how many removals each group gives up, of all holders together.
        holders: of the paths; None where they are all here.

    Returns:
        For each target `(n_blocks,)` int64: how many units each block gives up. They sum to the quotas.
    """
    holders = holders or Alone()
    paths = [path for group in groups for path in group]
    member = torch.tensor([index for index, group in enumerate(groups) for _ in group], dtype=torch.int64)
    wanted = torch.tensor(quotas, dtype=torch.int64)

    def count(bits: torch.Tensor, right: bool) -> list[torch.Tensor]:
        """Return how many removals of each block cost less than its group's threshold, or (right) no more than that."""
        values = bits.to(torch.int32).view(torch.float32)[member].tolist()
        return [
            torch.searchsorted(path, path.new_full((len(path), 1), value), right=right)[:, 0]
            for path, value in zip(paths, values, strict=True)
        ]

    def by_target(counts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([each.sum() for each in counts]).cpu()

    def totals(counts: list[torch.Tensor]) -> torch.Tensor:
        return holders.sum(torch.zeros_like(wanted).index_add_(0, member, by_target(counts)))

    # Bisect on the bits of the thresholds: the lowest at or below which there are enough removals.
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, INFINITY_BITS)
    while (low < high).any():
        middle = (low + high) // 2
        enough = totals(count(middle, right=True)) >= wanted
        low, high = torch.where(enough, low, torch.minimum(middle + 1, high)), torch.where(enough, middle, high)
    counts = count(low, right=False)
    ties = [upto - below for upto, below in zip(count(low, right=True), counts, strict=True)]
    left = (wanted - totals(counts)).tolist()
    own = by_target(ties)
    earlier, everyone = holders.before(own).tolist(), holders.sum(own.clone()).tolist()
    for index, (group, tie) in enumerate(zip(member.tolist(), ties, strict=True)):
        before = tie.cumsum(dim=0) - tie
        counts[index] += torch.minimum(tie, (left[group] - earlier[index] - before).clamp_min(0))
        left[group] = max(0, left[group] - everyone[index])
    remaining = iter(counts)
    return [[next(remaining) for _ in group] for group in groups]


def allocate_global(
    paths: Sequence[torch.Tensor], num_removed: int, holders: Holders | None = None
) -> list[torch.Tensor]:
    """Take the `num_removed` cheapest removals over all targets (arXiv 2210.09223, section 3: global selection).

    Arguments and result are those of `allocate`.
    """
    return allocate([paths], [num_removed], holders)[0]


def allocate_uniform(
    paths: Sequence[torch.Tensor], sizes: Sequence[int], sparsity: float, holders: Holders | None = None
) -> list[torch.Tensor]:
    """Give every target the same sparsity, by the cheapest removals inside each.

    A target that has more zeros than that already keeps them; the others then share the rest evenly.

    Args:
        paths: as for `allocate`.
        sizes: the number of units of each target.
        sparsity: of all targets together, exact to the unit.
        holders: as for `allocate`.
    """
    holders = holders or Alone()
    zeros = holders.sum(torch.stack([(path == 0).sum() for path in paths]).cpu()).tolist()
    quotas = uniform_quotas(zeros, sizes, round(sum(sizes) * sparsity))
    return [counts for (counts,) in allocate([[path] for path in paths], quotas, holders)]


def uniform_quotas(zeros: Sequence[int], sizes: Sequence[int], total: int) -> list[int]:
    """Return how many of each target's weights are 0 in the end, of `total` in all, evenly if it can be.

    Args:
        zeros: how many are 0 already.
        sizes: how many weights there are.
        total: the sum of what is returned.
    """
    beyond: set[int] = set()
    while True:
        room = sum(size for index, size in enumerate(sizes) if index not in beyond)
        level = (total - sum(zeros[index] for index in beyond)) / max(room, 1)
        more = {index for index, size in enumerate(sizes) if index not in beyond and zeros[index] > level * size}
        if not more:
            break
        beyond |= more
    quotas, exact, given = [], 0.0, 0
    for index, size in enumerate(sizes):
        quota = zeros[index]
        if index not in beyond:
            exact += level * size
            quota = int(exact + 0.5) - given
            given += quota
        quotas.append(quota)
    return quotas


def removal_turns(order: torch.Tensor, size: int, unit: int = 1) -> torch.Tensor:
    """Return `(n, size)` int64, which removal of `order[i]` `(n, steps)` a weight goes with, `steps` if with none.

    Args:
        order: which units of so many weights go, one after the other.
        size: weights of a block.
        unit: weights that go together.
    """
    count, steps = order.shape
    turns = order.new_full((count, size // unit), steps)
    turns.scatter_(1, order, torch.arange(steps, device=order.device).expand(count, -1))
    return turns.repeat_interleave(unit, dim=1)
