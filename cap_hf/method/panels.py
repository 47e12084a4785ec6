"""The elimination on any device, all blocks at once, in panels of steps: what a GPU runs (see `elimination`)."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cap_hf.errors import reason
from cap_hf.kernels.build import are_disabled
from cap_hf.method.steps import Panel, remove_in_torch, remove_units_in_torch
from cap_hf.patterns import NMPattern, Pattern, unit_of

logger = logging.getLogger(__name__)

# Steps between two updates of the inverse: long enough that the update is a matrix product, short enough that
# the pending columns stay in the cache.
PANEL = 64
# Blocks on which another way to do the steps is tried, several panels of one warp and of several, and how far its
# losses and its order may be from PyTorch's.
CHECKED: tuple[tuple[int, NMPattern | None], ...] = ((96, None), (96, NMPattern(2, 4)), (600, None))
MOST_WRONG, MOST_MOVED = 1e-3, 5e-2


class LostPivotError(ArithmeticError):
    """Rounding made a pivot zero, negative or not finite: in `block`, and in all that are True in `lost`, `(n,)`."""

    def __init__(self, lost: torch.Tensor) -> None:
        self.block, self.lost = int(lost.nonzero()[0, 0]), lost
        super().__init__(f"lost the pivot of block {self.block}")


@dataclass
class Elimination:
    """The greedy removal order of a set of blocks.

    Attributes:
        order: `(n, steps)` int64, the position removed at each step.
        losses: `(n, steps)`, the increase of the quadratic loss at each step, `w_p^2 / (2 A_pp)`.
    """

    order: torch.Tensor
    losses: torch.Tensor


def eliminate_in_torch(
    weights: torch.Tensor,
    inverse: torch.Tensor,
    pattern: Pattern | None = None,
    remove: Callable[[Panel], None] | None = None,
) -> Elimination:
    """Eliminate on any device, all blocks at once: what GPUs run, and what the kernel of CPUs is checked against.

    Removing entry p costs `w_p^2 / (2 A_pp)` and moves the others by `-A[:, p] w_p / A_pp`; `A` then loses rank
    one. Within a panel of steps only the pivots' columns of the current `A` are formed (left-looking); after it
    one matrix product brings `A` up to date on the survivors, so the work is 2/3 B^3 a block, almost all of it
    matrix products, and nothing but `A` itself is carried along. The weights of a unit are removed one after the other:
    together that costs `1/2 w_Q^T (A_QQ)^-1 w_Q`. Arguments and results are those of
    `cap_hf.method.elimination.eliminate`.

    Args:
        remove: does the steps of a panel; None for the fastest that this device is known to do right. Of units of
            several weights PyTorch always does them.
    """
    n, size = weights.shape
    unit, (group, limit) = unit_of(pattern), group_of(pattern)
    steps = num_steps(size, pattern) * unit
    if unit > 1:
        remove = functools.partial(remove_units_in_torch, unit=unit)
    remove = remove or fastest(weights.device, weights.dtype)
    weights, a = weights.contiguous(), inverse.contiguous()
    w = weights.clone()
    position = torch.arange(size, device=w.device).repeat(n, 1)
    order = torch.empty(n, steps, dtype=torch.int64, device=w.device)
    losses = torch.empty(n, steps, dtype=w.dtype, device=w.device)
    given = torch.zeros(n, size // group if group else 0, dtype=torch.int64, device=w.device)
    zero = weights == 0
    # Memory that is fresh from the system costs more to touch than these copies: take it once.
    work = inverse.new_empty(inverse.numel()), inverse.new_empty(inverse.numel())

    for start in range(0, steps, PANEL):
        count = min(PANEL, steps - start)
        width = a.shape[-1]
        diagonal = a.diagonal(dim1=-2, dim2=-1).clone()
        columns = a.new_empty(n, count, width)
        pivots = torch.empty(n, count, dtype=torch.int64, device=w.device)
        costs, removed = w.new_empty(n, count), torch.zeros_like(zero)
        remove(Panel(a, w, diagonal, zero, position, given, columns, pivots, costs, removed, group, limit))
        costs = costs.square().div_(2)
        # What costs infinitely much looks as if it were removed, and something removed is taken instead of it.
        lost = ~costs.isfinite().all(dim=1) | (removed.sum(dim=1) < count)
        if lost.any():
            raise LostPivotError(lost)
        order[:, start : start + count] = position.gather(1, pivots)
        losses[:, start : start + count] = costs
        if start + count < steps:
            left = (~removed).nonzero()[:, 1].view(n, width - count)
            w, zero, position = w.gather(1, left), zero.gather(1, left), position.gather(1, left)
            columns = columns.gather(2, left[:, None].expand(n, count, -1))
            a = select_symmetric(a, left, *work).baddbmm_(columns.mT, columns, alpha=-1)
            work = work[::-1]
    if unit > 1:
        order, losses = order[:, ::unit] // unit, losses.unflatten(1, (-1, unit)).sum(dim=2)
    return Elimination(order, losses)


@functools.cache
def fastest(device: torch.device, dtype: torch.dtype) -> Callable[[Panel], None]:
    """Return what does the steps of a panel on a device: on CUDA one kernel, if it does what PyTorch does there.

    That is tried once, on a few small blocks. If it does not, or Triton is missing, one warning says why.
    """
    if device.type != "cuda" or are_disabled():
        return remove_in_torch
    try:
        remove = load_fused()
        check_fused(remove, device, dtype)
    except Exception as error:  # whatever a compiler or a driver may do
        logger.warning("The Triton kernel of the elimination cannot be used, slower PyTorch code is: %s", reason(error))
        return remove_in_torch
    return remove


def load_fused() -> Callable[[Panel], None]:
    """Return the kernel that does all steps of a panel at once.

    Raises:
        ImportError: Triton is not installed.
    """
    from cap_hf.kernels.panel import remove

    return lambda panel: remove(**vars(panel))


def check_fused(remove: Callable[[Panel], None], device: torch.device, dtype: torch.dtype) -> None:
    """Raise an ArithmeticError if a way to do the steps of a panel does not do what PyTorch does, to rounding."""
    generator = torch.Generator("cpu").manual_seed(0)
    for size, pattern in CHECKED:
        roots, weights = (
            torch.randn(2, *shape, dtype=torch.float64, generator=generator, device="cpu")
            for shape in ((size, size), (size,))
        )
        matrices = roots @ roots.mT / size + torch.eye(size, dtype=torch.float64, device="cpu")
        weights[:, ::7] = 0.0
        arguments = (weights.to(device, dtype), matrices.to(device, dtype), pattern)
        expected, found = (eliminate_in_torch(*arguments, each) for each in (remove_in_torch, remove))
        wrong = float((found.losses - expected.losses).abs().amax() / expected.losses.amax())
        # Weights that cost nearly the same may change places.
        moved = float((found.order != expected.order).double().mean())
        if not wrong < MOST_WRONG or moved > MOST_MOVED:
            raise ArithmeticError(
                f"in blocks of {size} its losses are {wrong:.1e} from PyTorch's, and {moved:.1%} of the removals come "
                "at another time"
            )


def num_steps(size: int, pattern: Pattern | None) -> int:
    """Return how many removals a block of `size` weights has: of each, of each unit, or of those that N:M allows."""
    return size if pattern is None else pattern.steps(size)


def group_of(pattern: Pattern | None) -> tuple[int, int]:
    """Return M of an N:M pattern and how many of a group may go, or zeros."""
    return (pattern.m, pattern.m - pattern.n) if isinstance(pattern, NMPattern) else (0, 0)


def select_symmetric(
    matrices: torch.Tensor, index: torch.Tensor, rows: torch.Tensor | None = None, spare: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `out[b, i, j] = matrices[b, index[b, i], index[b, j]]` for symmetric `(n, B, B)` and index `(n, m)`.

    Whole rows are copied twice with a transpose between, which is several times faster than a gather of entries.

    Args:
        matrices: `(n, B, B)`.
        index: `(n, m)`.
        rows: 1-d memory of at least `n m B` entries, which the result will lie in; not `matrices`'.
        spare: the same, to work in; may be `matrices`' own.
    """
    n, size, _ = matrices.shape
    width = index.shape[1]
    rows = matrices.new_empty(matrices.numel()) if rows is None else rows
    spare = matrices.new_empty(matrices.numel()) if spare is None else spare
    flat = (index + size * torch.arange(n, device=index.device)[:, None]).flatten()
    half = rows[: n * width * size].view(n * width, size)
    torch.index_select(matrices.reshape(n * size, size), 0, flat, out=half)
    turned = spare[: n * size * width].view(n, size, width)
    turned.copy_(half.view(n, width, size).mT)
    result = rows[: n * width * width].view(n * width, width)
    torch.index_select(turned.view(n * size, width), 0, flat, out=result)
    return result.view(n, width, width)
