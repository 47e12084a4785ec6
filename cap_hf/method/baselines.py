"""Removal in the order of fixed scores, as the baselines magnitude, wanda and obs do it."""

import torch

from cap_hf.masks import zero_units
from cap_hf.method.panels import Elimination
from cap_hf.method.steps import own_parts, unit_costs
from cap_hf.patterns import NMPattern, Pattern, unit_of


def rank_scores(scores: torch.Tensor, pattern: Pattern | None) -> Elimination:
    """Return the order of scores `(n, B)`, lowest first; with N:M the M - N lowest of each group.

    Units of several weights have scores of their own, `(n, units)`: see `unit_scores`.
    """
    if not isinstance(pattern, NMPattern):
        losses, order = scores.sort(dim=1, stable=True)
        return Elimination(order, losses)
    groups = scores.unflatten(1, (-1, pattern.m))
    lowest = groups.sort(dim=2, stable=True).indices[..., : pattern.m - pattern.n]
    offsets = torch.arange(groups.shape[1], device=scores.device)[:, None] * pattern.m
    candidates = (lowest + offsets).flatten(1)
    losses, order = scores.gather(1, candidates).sort(dim=1, stable=True)
    return Elimination(candidates.gather(1, order), losses)


def unit_scores(scores: torch.Tensor, pattern: Pattern | None) -> torch.Tensor:
    """Return the sums of the weights' scores `(n, B)` over each unit, `(n, units)`.

    A weight that is 0 has a negative score, or none; it adds nothing, and a unit of such weights goes before any other.
    """
    if unit_of(pattern) == 1:
        return scores
    units = scores.unflatten(1, (-1, unit_of(pattern)))
    return units.clamp_min(0).sum(dim=2).masked_fill((units < 0).all(dim=2), -1.0)


def saliencies(weights: torch.Tensor, inverse: torch.Tensor, pattern: Pattern | None = None) -> torch.Tensor:
    """Return what the removal of each unit alone costs (oBERT, arXiv 2203.07259, equation 2 and section 3).

    Args:
        weights: `(n, B)`. Units that are 0 cost less than any other.
        inverse: `(n, B, B)`, the inverse damped Fisher.
        pattern: with blocks `w_Q^T (A_QQ)^-1 w_Q / 2`, else `w_p^2 / (2 A_pp)`.
    """
    unit = unit_of(pattern)
    scores = unit_costs(weights.unflatten(1, (-1, unit)), own_parts(inverse, unit)) / 2
    return scores.masked_fill(zero_units(weights, unit), -1.0)


def input_scores(weights: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return each weight's magnitude times the norm of its input, `|w_ij| ||x_j||` (Wanda, arXiv 2306.11695, eq. 1).

    Args:
        weights: `(n, B)`, whole rows. Entries that are 0 score less than any other.
        moment: `(n, B, B)`, the second moment of the rows' inputs over all calibration tokens; its diagonal is looked
            at. A factor that all inputs share changes no order.
    """
    scores = weights.abs() * moment.diagonal(dim1=-2, dim2=-1).sqrt()
    return scores.masked_fill(weights == 0, -1.0)
