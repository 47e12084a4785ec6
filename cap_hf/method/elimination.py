"""The greedy correlation-aware elimination (arXiv 2210.09223, section 3 and Algorithm 1), on tensors alone."""

import torch

from cap_hf.kernels.build import has_kernels
from cap_hf.method.inverses import NotInvertibleError, invert, invert_quickly
from cap_hf.method.panels import Elimination, LostPivotError, eliminate_in_torch, group_of, num_steps
from cap_hf.patterns import Pattern, unit_of


def eliminate_fisher(weights: torch.Tensor, fisher: torch.Tensor, pattern: Pattern | None = None) -> Elimination:
    """Do what `eliminate` does with the inverse of a Fisher, in float32 wherever that is accurate enough.

    The order of removals and their losses say which weights go, and no more: what becomes of the others is solved for
    in float64 (see `cap_hf.method.reconstruction`). So half the digits do, at twice the speed, and on many GPUs at 64
    times. Blocks that float32 cannot invert well, or whose elimination it loses on the way, are done in float64: which
    they are does not depend on the others.

    Args:
        weights: `(n, B)` in float64.
        fisher: `(n, B, B)` in float64, damp already on the diagonal; one matrix may be expanded.
        pattern: as for `eliminate`.

    Raises:
        NotInvertibleError, LostPivotError: as of `invert` and `eliminate`, in float64.
    """
    # By powers of two, which change no digit, so that float32 holds small Fishers and the squares of small weights.
    scale, unit = power_of_two(fisher.diagonal(dim1=-2, dim2=-1)), power_of_two(weights.abs())
    scaled = weights / unit
    shared = len(fisher) > 1 and fisher.stride(0) == 0
    inverse, accurate = invert_quickly(fisher[:1], scale[:1]) if shared else invert_quickly(fisher, scale)
    accurate = accurate.expand(len(fisher)).clone()

    def of(matrices: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if shared:
            return matrices[:1].expand(len(index), -1, -1)
        return matrices if len(index) == len(weights) else matrices[index]

    steps = num_steps(weights.shape[1], pattern)
    order = torch.empty(len(weights), steps, dtype=torch.int64, device=weights.device)
    losses = weights.new_empty(order.shape)
    while len(index := accurate.nonzero()[:, 0]):
        try:
            found = eliminate(scaled[index].float(), of(inverse, index), pattern)
        except LostPivotError as error:
            accurate[index[error.lost]] = False
            continue
        order[index], losses[index] = found.order, found.losses.double() * (scale * unit.square())[index]
        break
    index = (~accurate).nonzero()[:, 0]
    if len(index):
        try:
            found = eliminate(weights[index], invert(of(fisher, index)), pattern)
        except (NotInvertibleError, LostPivotError) as error:
            error.block = int(index[error.block])
            raise
        order[index], losses[index] = found.order, found.losses
    return Elimination(order, losses)


def power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Return `(n, 1)` powers of two near the means of values `(n, B)`; 1 where a mean is 0 or not finite."""
    mean = values.mean(dim=1, keepdim=True)
    mean = torch.where(mean.isfinite() & (mean > 0), mean, 1.0)
    return torch.exp2(mean.log2().round())


def decouple(fisher: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return `(n, B, B)` Fishers in which entries marked by `zero` `(n, B)` are alone: their rows are the identity's.

    Weights that are 0 and stay 0 cannot make up for others; the inverse of this is the survivors' own.
    """
    if not zero.any():
        return fisher
    fisher = fisher.masked_fill(zero[:, :, None] | zero[:, None, :], 0.0)
    fisher.diagonal(dim1=-2, dim2=-1).masked_fill_(zero, 1.0)
    return fisher


def eliminate(weights: torch.Tensor, inverse: torch.Tensor, pattern: Pattern | None = None) -> Elimination:
    """Remove the cheapest weight, move the others, repeat, in all blocks (arXiv 2210.09223, Algorithm 1).

    On a CPU a compiled kernel does what `eliminate_in_torch` does, block by block in the core's cache.

    Args:
        weights: `(n, B)`. Entries that are 0 are removed first, at no cost.
        inverse: `(n, B, B)`, the inverse damped Fisher `A`, symmetric. Not changed.
        pattern: N:M, then no group of M consecutive entries gives up more than M - N; or blocks, which go as a whole.

    Returns:
        The order and losses of all B removals, of the `B (M - N) / M` that N:M allows, or of all units.

    Raises:
        LostPivotError: rounding destroyed a pivot.
    """
    if not has_kernels(weights, torch.float32):
        return eliminate_in_torch(weights, inverse, pattern)
    steps, (group, limit) = num_steps(weights.shape[1], pattern), group_of(pattern)
    order, losses, lost = torch.ops.cap_hf.eliminate(weights, inverse, steps, group, limit, unit_of(pattern))
    if lost.any():
        raise LostPivotError(lost)
    return Elimination(order, losses)
