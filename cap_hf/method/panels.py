"""The elimination on any device, all blocks at once, in panels of steps: what a GPU runs (see `elimination`)."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cap_hf.config import NMPattern
from cap_hf.errors import reason
from cap_hf.kernels.build import are_disabled

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


@dataclass
class Panel:
    """What some steps of the elimination of n blocks, `width` weights of each of which are left, read and write.

    Attributes:
        matrices: `(n, width, width)`, their inverse Fishers A before these steps.
        weights: `(n, width)`; changed.
        diagonal: `(n, width)`, of A; changed.
        zero: `(n, width)` bool, weights that were 0 from the beginning.
        position: `(n, width)` int64, where in the block each weight was.
        given: `(n, groups)` int64, how many weights each group of an N:M pattern has given up; changed.
        columns: `(n, count, width)` for the columns of A at each step's pivot, divided by the pivot's root.
        pivots: `(n, count)` int64 for the places among the `width` of what each step removes.
        costs: `(n, count)` for the roots of twice the losses.
        removed: `(n, width)` bool for what all steps have removed.
        group: M of the pattern, 0 for none.
        limit: how many weights a group may give up.
    """

    matrices: torch.Tensor
    weights: torch.Tensor
    diagonal: torch.Tensor
    zero: torch.Tensor
    position: torch.Tensor
    given: torch.Tensor
    columns: torch.Tensor
    pivots: torch.Tensor
    costs: torch.Tensor
    removed: torch.Tensor
    group: int
    limit: int


def eliminate_in_torch(
    weights: torch.Tensor,
    inverse: torch.Tensor,
    pattern: NMPattern | None = None,
    remove: Callable[[Panel], None] | None = None,
) -> Elimination:
    """Eliminate on any device, all blocks at once: what GPUs run, and what the kernel of CPUs is checked against.

    Removing entry p costs `w_p^2 / (2 A_pp)` and moves the others by `-A[:, p] w_p / A_pp`; `A` then loses rank
    one. Within a panel of steps only the pivots' columns of the current `A` are formed (left-looking); after it
    one matrix product brings `A` up to date on the survivors, so the work is 2/3 B^3 a block, almost all of it
    matrix products, and nothing but `A` itself is carried along. Arguments and results are those of
    `cap_hf.method.elimination.eliminate`.

    Args:
        remove: does the steps of a panel; None for the fastest that this device is known to do right.
    """
    n, size = weights.shape
    steps = num_steps(size, pattern)
    remove = remove or fastest(weights.device, weights.dtype)
    group, limit = (0, 0) if pattern is None else (pattern.m, pattern.m - pattern.n)
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
    return Elimination(order, losses)


def remove_in_torch(panel: Panel) -> None:
    """Remove the cheapest weight of each block, `count` times.

    What the steps have in common is done before or after them, because on a GPU a step takes as long as its kernels
    take to launch.
    """
    w, a, diagonal, zero, removed = panel.weights, panel.matrices, panel.diagonal, panel.zero, panel.removed
    n, count, _ = panel.columns.shape
    batch = torch.arange(n, device=w.device)
    for k in range(count):
        scores = (w.square() / diagonal).masked_fill_(zero, -1.0).masked_fill_(removed, torch.inf)
        if panel.group:
            full = panel.given.gather(1, panel.position // panel.group) == panel.limit
            scores.masked_fill_(full, torch.inf)
        pivot = torch.argmin(scores, dim=1, keepdim=True, out=panel.pivots[:, k : k + 1])
        root = diagonal.gather(1, pivot).sqrt_()
        column = a[batch, pivot[:, 0]]
        if k:
            past = panel.columns[:, :k]
            at_pivot = past.gather(2, pivot[:, None].expand(n, k, 1))
            column = torch.baddbmm(column[:, None], at_pivot.mT, past, alpha=-1)[:, 0]
        column = torch.div(column, root, out=panel.columns[:, k])
        cost = torch.div(w.gather(1, pivot), root, out=panel.costs[:, k : k + 1])
        w.addcmul_(column, cost, value=-1).scatter_(1, pivot, 0.0)
        diagonal.addcmul_(column, column, value=-1)
        removed.scatter_(1, pivot, True)
        if panel.group:
            group = panel.position.gather(1, pivot) // panel.group
            panel.given.scatter_add_(1, group, torch.ones_like(group))


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


def num_steps(size: int, pattern: NMPattern | None) -> int:
    """Return how many weights of a block of `size` are removed: all, or as many as an N:M pattern allows."""
    return size if pattern is None else pattern.steps(size)


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
