"""Removal in the order of fixed scores, as the baselines magnitude, wanda and obs do it."""

import torch

from cap_hf.config import NMPattern
from cap_hf.method.panels import Elimination


def rank_scores(scores: torch.Tensor, pattern: NMPattern | None) -> Elimination:
    """Return the order of scores `(n, B)`, lowest first; with N:M the M - N lowest of each group."""
    if pattern is None:
        losses, order = scores.sort(dim=1, stable=True)
        return Elimination(order, losses)
    groups = scores.unflatten(1, (-1, pattern.m))
    lowest = groups.sort(dim=2, stable=True).indices[..., : pattern.m - pattern.n]
    offsets = torch.arange(groups.shape[1], device=scores.device)[:, None] * pattern.m
    candidates = (lowest + offsets).flatten(1)
    losses, order = scores.gather(1, candidates).sort(dim=1, stable=True)
    return Elimination(candidates.gather(1, order), losses)


def saliencies(weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return what the removal of each weight alone costs, `w_p^2 / (2 A_pp)` (oBERT, arXiv 2203.07259, equation 2).

    Args:
        weights: `(n, B)`. Entries that are 0 cost less than any other.
        inverse: `(n, B, B)`, the inverse damped Fisher.
    """
    scores = weights.square() / inverse.diagonal(dim1=-2, dim2=-1) / 2
    return scores.masked_fill(weights == 0, -1.0)


def input_scores(weights: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return each weight's magnitude times the norm of its input, `|w_ij| ||x_j||` (Wanda, arXiv 2306.11695, eq. 1).

    Args:
        weights: `(n, B)`, whole rows. Entries that are 0 score less than any other.
        moment: `(n, B, B)`, the second moment of the rows' inputs over all calibration tokens; its diagonal is looked
            at. A factor that all inputs share changes no order.
    """
    scores = weights.abs() * moment.diagonal(dim1=-2, dim2=-1).sqrt()
    return scores.masked_fill(weights == 0, -1.0)
