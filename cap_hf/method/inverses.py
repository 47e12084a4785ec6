"""Inverses of damped block Fishers: exact ones in float64, and quick ones in float32 that are checked."""

import torch

from cap_hf.kernels.build import has_kernels

# The largest error of `F A v - v`, for a v of ones and minus ones, relative to the length of v, with which an inverse A
# in float32 is taken. Fishers with condition numbers of 10^6 are below it.
MOST_RESIDUAL = 0.1
# Entries of the blocks that a GPU's library factorises; larger ones are made of matrix products.
LEAF = 64


class NotInvertibleError(ArithmeticError):
    """A damped block Fisher is not positive definite in float64; `damp` is an absolute one that would do."""

    def __init__(self, block: int, damp: float) -> None:
        super().__init__(f"block {block} is not positive definite; an absolute damp of {damp:.1e} would do")
        self.block, self.damp = block, damp


def invert(fisher: torch.Tensor) -> torch.Tensor:
    """Return the inverses of damped block Fishers, by Cholesky.

    Args:
        fisher: `(n, B, B)`, symmetric, damp already on the diagonal.

    Raises:
        NotInvertibleError: a block is not positive definite.
    """
    if len(fisher) > 1 and fisher.stride(0) == 0:  # one matrix, expanded
        return invert(fisher[:1]).expand_as(fisher)
    if has_kernels(fisher, torch.float32):
        inverse, info = torch.ops.cap_hf.invert(fisher)
    else:
        factor, info = torch.linalg.cholesky_ex(fisher)
        inverse = None if info.any() else torch.cholesky_inverse(factor)
    check_factors(fisher, info)
    return inverse


def invert_quickly(fisher: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inverses in float32 of Fishers `(n, B, B)` over `scale` `(n, 1)`, and which can be used, `(n,)` bool.

    Args:
        fisher: in float64.
        scale: powers of two.
    """
    if has_kernels(fisher):
        inverse, error = torch.ops.cap_hf.invert_quickly(fisher, 1 / scale[:, 0])
        return inverse, error < MOST_RESIDUAL
    matrices = (fisher / scale[:, :, None]).float()
    if matrices.device.type == "cpu":
        factor, info = factorise(matrices)
        inverse = torch.cholesky_inverse(factor)
    else:
        inverse, _, info = invert_by_halves(matrices)
    # In sums of one row each, which are the same however many blocks there are; matrix products round otherwise.
    signs = torch.ones(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    signs[::2] = -1
    solved = (inverse * signs).sum(dim=-1, dtype=torch.float64)
    residual = (matrices * solved[:, None]).sum(dim=-1) - signs
    # As large as the error of a single column; what is not a number is not below anything.
    error = residual.abs().amax(dim=1) / max(1, len(signs)) ** 0.5
    return inverse, (info == 0) & (error < MOST_RESIDUAL)


def invert_by_halves(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return inverses `(n, B, B)`, those of their Cholesky factors, and `(n,)` what is 0 where there are any.

    Almost all of it is matrix products: libraries for GPUs factorise many small matrices at once at a few hundredths of
    their speed. With the inverse of the first half's factor the factor's other rows are a product, and what is left of
    the second half is inverted the same way. To go by the inverses of the halves themselves instead would be two
    products less, and loses two more digits.
    """
    size = matrices.shape[-1]
    if size <= LEAF:
        factor, info = factorise(matrices)
        factor = torch.linalg.solve_triangular(factor, eye_like(factor), upper=False)
        return factor.mT @ factor, factor, info
    half = LEAF * -(-size // (2 * LEAF))
    first, second = slice(0, half), slice(half, size)
    inverse, factor = torch.empty_like(matrices), torch.zeros_like(matrices)
    inverse[:, first, first], factor[:, first, first], info = invert_by_halves(matrices[:, first, first])
    below = matrices[:, second, first] @ factor[:, first, first].mT
    left = torch.baddbmm(matrices[:, second, second], below, below.mT, alpha=-1)
    inverse[:, second, second], factor[:, second, second], others = invert_by_halves(left)
    corner = factor[:, second, second] @ (below @ factor[:, first, first]).neg_()
    factor[:, second, first] = corner
    inverse[:, first, first].baddbmm_(corner.mT, corner)
    inverse[:, second, first] = factor[:, second, second].mT @ corner
    inverse[:, first, second] = inverse[:, second, first].mT
    return inverse, factor, info | others


def factorise(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Cholesky factors `(n, B, B)`, and `(n,)` what is 0 where there is one; the identity elsewhere."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    # Libraries end with an error at a factor with a 0 on its diagonal.
    return torch.where((info == 0)[:, None, None], factor, eye_like(factor)), info


def eye_like(matrices: torch.Tensor) -> torch.Tensor:
    """Return the identity, expanded to the shape of matrices `(n, B, B)`."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand_as(matrices)


def check_factors(fisher: torch.Tensor, info: torch.Tensor) -> None:
    """Raise a NotInvertibleError for the first block that could not be factorised, whole or without some entries.

    Args:
        fisher: `(n, B, B)`. What lifts the eigenvalues of a block lifts those of any part of it as well.
        info: `(n,)`, 0 where the factorisation went well, as LAPACK gives it.
    """
    if info.any():
        block = int(info.nonzero()[0, 0])
        eigenvalues = torch.linalg.eigvalsh(fisher[block])
        # Enough to lift the lowest eigenvalue well above what float64 loses.
        raise NotInvertibleError(block, float(-2 * eigenvalues[0].clamp(max=0) + 1e-10 * eigenvalues[-1].abs()))
