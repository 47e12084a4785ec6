"""The steps of a panel of the elimination in PyTorch: which weight or unit goes, and what that makes of the others."""

from dataclasses import dataclass

import torch


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


def remove_in_torch(panel: Panel) -> None:
    """Remove the cheapest weight of each block, `count` times.

    What the steps have in common is done before or after them, because on a GPU a step takes as long as its kernels
    take to launch.
    """
    w, diagonal, zero, removed = panel.weights, panel.diagonal, panel.zero, panel.removed
    batch = torch.arange(len(w), device=w.device)
    for k in range(panel.columns.shape[1]):
        scores = (w.square() / diagonal).masked_fill_(zero, -1.0).masked_fill_(removed, torch.inf)
        if panel.group:
            full = panel.given.gather(1, panel.position // panel.group) == panel.limit
            scores.masked_fill_(full, torch.inf)
        pivot = torch.argmin(scores, dim=1, keepdim=True, out=panel.pivots[:, k : k + 1])
        remove_weight(panel, k, batch)
        if panel.group:
            group = panel.position.gather(1, pivot) // panel.group
            panel.given.scatter_add_(1, group, torch.ones_like(group))


def remove_units_in_torch(panel: Panel, unit: int) -> None:
    """Remove the cheapest unit of each block, and so on, `count` weights in all."""
    w, n = panel.weights, len(panel.weights)
    batch = torch.arange(n, device=w.device)
    own = own_parts(panel.matrices, unit).clone()
    for k in range(panel.columns.shape[1]):
        if k % unit == 0:
            scores = unit_costs(w.unflatten(1, (-1, unit)), own)
            scores.masked_fill_(panel.zero.unflatten(1, (-1, unit)).all(dim=2), -1.0)
            scores.masked_fill_(panel.removed[:, ::unit], torch.inf)
            first = torch.argmin(scores, dim=1, keepdim=True) * unit
        torch.add(first, k % unit, out=panel.pivots[:, k : k + 1])
        remove_weight(panel, k, batch)
        column = panel.columns[:, k].unflatten(1, (-1, unit))
        own.addcmul_(column[..., None], column[:, :, None], value=-1)


def remove_weight(panel: Panel, k: int, batch: torch.Tensor) -> None:
    """Remove the weight that is the `k`-th pivot of each block.

    Args:
        panel: of the blocks.
        k: of the step.
        batch: `(n,)` the blocks' numbers.
    """
    w, n = panel.weights, len(panel.weights)
    pivot = panel.pivots[:, k : k + 1]
    root = panel.diagonal.gather(1, pivot).sqrt_()
    column = panel.matrices[batch, pivot[:, 0]]
    if k:
        past = panel.columns[:, :k]
        at_pivot = past.gather(2, pivot[:, None].expand(n, k, 1))
        column = torch.baddbmm(column[:, None], at_pivot.mT, past, alpha=-1)[:, 0]
    column = torch.div(column, root, out=panel.columns[:, k])
    cost = torch.div(w.gather(1, pivot), root, out=panel.costs[:, k : k + 1])
    w.addcmul_(column, cost, value=-1).scatter_(1, pivot, 0.0)
    panel.diagonal.addcmul_(column, column, value=-1)
    panel.removed.scatter_(1, pivot, True)


def own_parts(matrices: torch.Tensor, unit: int) -> torch.Tensor:
    """Return of matrices `(n, B, B)` what lies on the diagonal for each unit, `(n, B / unit, unit, unit)`; a view."""
    return matrices.unflatten(1, (-1, unit)).unflatten(3, (-1, unit)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def unit_costs(weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return what the removal of units costs, `w_Q^T (A_QQ)^-1 w_Q` (oBERT, arXiv 2203.07259, section 3).

    Args:
        weights: `(..., k)` of a unit of k weights.
        inverse: `(..., k, k)` its own part of A; not changed.

    Returns:
        `(...)`, twice the loss. Weight by weight, as many for all units: GPUs launch few kernels for it.
    """
    weights, inverse = weights.clone(), inverse.clone()
    costs = torch.zeros_like(weights[..., 0])
    for first in range(weights.shape[-1]):
        pivot, value = inverse[..., first, first].clone(), weights[..., first].clone()
        costs += value.square() / pivot
        column = inverse[..., first].clone()
        weights -= column * (value / pivot)[..., None]
        inverse -= column[..., None] * (column / pivot[..., None])[..., None, :]
    return costs
