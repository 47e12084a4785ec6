"""How many weights each block gives up: global, uniform, N:M. Exact to the weight, ties included."""

from collections.abc import Sequence

import torch

# Losses are compared as float32: non-negative floats order like the integers that their bits spell.
TINY = torch.finfo(torch.float32).tiny
INFINITY_BITS = 0x7F800000


def path_losses(losses: torch.Tensor, zeros: torch.Tensor, selection: str) -> torch.Tensor:
    """What a block's k-th removal is compared by, non-decreasing in k.

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


def allocate_global(paths: Sequence[torch.Tensor], num_removed: int) -> list[torch.Tensor]:
    """Take the `num_removed` cheapest removals over all targets.

    Args:
        paths: for each target `(n_blocks, steps)` float32 from `path_losses`.
        num_removed: how many weights are removed in all.

    Returns:
        For each target `(n_blocks,)` int64: how many weights each block gives up. They sum to `num_removed`.
    """
    if num_removed == 0:
        return [torch.zeros(len(path), dtype=torch.int64, device=path.device) for path in paths]
    # Bisect on the bits of the threshold: the lowest one at or below which there are enough removals.
    low, high = 0, INFINITY_BITS
    while low < high:
        middle = (low + high) // 2
        if sum(int((path.view(torch.int32) <= middle).sum()) for path in paths) >= num_removed:
            high = middle
        else:
            low = middle + 1
    counts = [(path.view(torch.int32) < low).sum(dim=1) for path in paths]
    left = num_removed - sum(int(count.sum()) for count in counts)
    for path, count in zip(paths, counts, strict=True):
        ties = (path.view(torch.int32) == low).sum(dim=1)
        before = ties.cumsum(dim=0) - ties
        taken = torch.minimum(ties, (left - before).clamp_min(0))
        count += taken
        left -= int(taken.sum())
    return counts


def allocate_uniform(paths: Sequence[torch.Tensor], sizes: Sequence[int], sparsity: float) -> list[torch.Tensor]:
    """The same sparsity in every target; the cheapest removals inside each.

    A target that has more zeros than that already keeps them; the others then share the rest evenly.

    Args:
        paths: as for `allocate_global`.
        sizes: the number of weights of each target.
        sparsity: of all targets together, exact to the weight.
    """
    zeros = [int((path == 0).sum()) for path in paths]
    total = round(sum(sizes) * sparsity)
    beyond: set[int] = set()
    while True:
        room = sum(size for index, size in enumerate(sizes) if index not in beyond)
        level = (total - sum(zeros[index] for index in beyond)) / max(room, 1)
        more = {index for index, size in enumerate(sizes) if index not in beyond and zeros[index] > level * size}
        if not more:
            break
        beyond |= more
    counts, exact, given = [], 0.0, 0
    for index, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        quota = zeros[index]
        if index not in beyond:
            exact += level * size
            quota = int(exact + 0.5) - given
            given += quota
        counts += allocate_global([path], quota)
    return counts


def removed_mask(order: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """`(n, size)` bool, True where one of the first `counts[i]` removals of row i's `order` `(n, steps)` lies."""
    first = torch.arange(order.shape[1], device=order.device) < counts[:, None]
    return torch.zeros(len(order), size, dtype=torch.bool, device=order.device).scatter_(1, order, first)
