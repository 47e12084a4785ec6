"""The weights that stay, given which go (arXiv 2210.09223, section 2: the OBS update, for a set of weights)."""

import torch

from cap_hf.kernels.build import has_kernels
from cap_hf.method.inverses import check_factors
from cap_hf.method.panels import select_symmetric


def reconstruct(weights: torch.Tensor, fisher: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the weights of least quadratic loss among those that are 0 outside `keep`, `(n, B)` bool, as `(n, B)`.

    Otherwise as `reconstruct_each`, of which this is one time.
    """
    return reconstruct_each(weights, fisher, keep.long(), keep.new_ones(1, len(keep), dtype=torch.int64))[0]


def reconstruct_each(
    weights: torch.Tensor, fisher: torch.Tensor, turns: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return the weights of least quadratic loss among those that are 0 but for survivors, for several sets of these.

    This is what the chain of single updates arrives at, solved at once on the survivors S only: with all weights w
    before pruning it is `F_SS w'_S = (F w)_S`. The survivors of a larger number of removals are among those of a
    smaller one. So with the last ones first there is one Cholesky factorisation of the largest F_SS, the factors of the
    others are leading parts of it, and what is left for each is one triangular solve.

    Args:
        weights: `(n, B)` before pruning.
        fisher: `(n, B, B)`, damp on the diagonal; may be one matrix, expanded.
        turns: `(n, B)` int64, when a weight goes.
        counts: `(times, n)` int64: those survive whose turn is this or a later one.

    Returns:
        `(times, n, B)` new weights, exactly 0 but for survivors, and where nothing goes but zeros exactly as before.
        With the kernels what comes out for one time does not depend on the others, to the bit; else it does by rounding
        in float64.

    Raises:
        NotInvertibleError: the survivors' Fisher of a block is not positive definite.
    """
    index = turns.argsort(dim=1, descending=True, stable=True)
    kept = (turns >= counts[..., None]).sum(dim=2)
    if has_kernels(weights):
        result, info = torch.ops.cap_hf.reconstruct(weights, fisher, index, kept)
        check_factors(fisher, info)
        return result
    ordered = weights.gather(1, index)
    place = torch.arange(weights.shape[1], device=weights.device)
    survives = place < kept[..., None]
    moves = (~survives & (ordered != 0)).any(dim=2)
    # A block of which nothing goes has nothing to be solved for.
    most = torch.where(moves, kept, 0).amax(dim=0) if len(kept) else kept.new_zeros(len(weights))
    width = int(most.max()) if len(most) else 0
    new = torch.where(survives, ordered, 0.0)
    if width:
        index_left, real = index[:, :width], place[:width] < most[:, None]
        # Shorter blocks are padded with rows of the identity.
        system = select_symmetric(fisher, index_left)
        system.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0.0)
        system.diagonal(dim1=-2, dim2=-1).masked_fill_(~real, 1.0)
        factor, info = torch.linalg.cholesky_ex(system)
        check_factors(fisher, info)
        right = torch.bmm(fisher, weights[..., None])[..., 0].gather(1, index_left)[..., None]
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        # Zeros below its last survivor leave a set the leading part of the triangle.
        halves = half * survives[..., :width].permute(1, 2, 0)
        solved = torch.linalg.solve_triangular(factor.mT, halves, upper=True).permute(2, 0, 1)
        new[..., :width] = torch.where(moves[..., None], solved, new[..., :width])
    return torch.zeros_like(new).scatter_(2, index.expand_as(new), torch.where(survives, new, 0.0))


def independent_update(weights: torch.Tensor, inverse: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the weights moved by the sum of the single OBS updates of all removed weights.

    So WoodFisher (arXiv 2004.14340, section 4) and oBERT (arXiv 2203.07259, section 3) apply it.

    Args:
        weights: `(n, B)` before pruning.
        inverse: `(n, B, B)`, the inverse damped Fisher.
        keep: `(n, B)` bool.

    Returns:
        `(n, B)` new weights, exactly 0 outside `keep`.
    """
    steps = weights.masked_fill(keep, 0.0) / inverse.diagonal(dim1=-2, dim2=-1)
    return (weights - torch.bmm(inverse, steps[..., None])[..., 0]).masked_fill(~keep, 0.0)
