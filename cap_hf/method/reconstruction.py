"""The weights that stay, given which go (arXiv 2210.09223, section 2: the OBS update, for a set of weights)."""

import torch

from cap_hf.kernels.build import has_kernels
from cap_hf.method.inverses import check_factors
from cap_hf.method.panels import select_symmetric


def reconstruct(weights: torch.Tensor, fisher: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the weights of least quadratic loss among those that are 0 outside `keep`.

    This is what the chain of single updates arrives at, solved at once on the survivors only:
    `F_SS (w'_S - w_S) = F_SP w_P` for survivors S and removed P.

    Args:
        weights: `(n, B)` before pruning.
        fisher: `(n, B, B)`, damp on the diagonal.
        keep: `(n, B)` bool.

    Returns:
        `(n, B)` new weights, exactly 0 outside `keep`.

    Raises:
        NotInvertibleError: the survivors' Fisher of a block is not positive definite.
    """
    if has_kernels(weights):
        result, info = torch.ops.cap_hf.reconstruct(weights, fisher, keep)
        check_factors(fisher, info)
        return result
    counts = keep.sum(dim=1)
    width = int(counts.max()) if len(counts) else 0
    if width == 0:
        return torch.zeros_like(weights)
    # Survivors first; shorter blocks are padded with rows of the identity.
    index = keep.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    real = torch.arange(width, device=keep.device) < counts[:, None]
    pull = torch.bmm(fisher, weights.masked_fill(keep, 0.0)[..., None])[..., 0]
    system = select_symmetric(fisher, index)
    system.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0.0)
    system.diagonal(dim1=-2, dim2=-1).masked_fill_(~real, 1.0)
    right = pull.gather(1, index).masked_fill_(~real, 0.0)[..., None]
    factor, info = torch.linalg.cholesky_ex(system)
    check_factors(fisher, info)
    moves = torch.cholesky_solve(right, factor)[..., 0]
    return weights.masked_fill(~keep, 0.0).scatter_add(1, index, moves.masked_fill_(~real, 0.0))


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
