"""What a model is scored by, and by how much one score is lower than another."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cap_hf.config import is_number
from cap_hf.data.standard_errors import standard_error
from cap_hf.errors import CAPError


@dataclass(frozen=True)
class Score:
    """A score with its standard error, of a model on images that other models are not compared on one by one.

    Attributes:
        value: higher is better.
        error: its standard error.
    """

    value: float
    error: float


# What a model is scored by: a number, a number with its error, or a tensor `(n,)` with the score of each image.
Scored = float | Score | torch.Tensor


def read_score(score: Any, what: str) -> Scored:
    """Return a score as one of three kinds, on the CPU; raise a CAPError if it is none, or not finite."""
    if isinstance(score, torch.Tensor):
        score = score.detach().double().cpu()
        if score.dim() == 0:
            score = float(score)
        elif score.dim() != 1 or not len(score):
            raise CAPError(f"evaluate gives {what} scores of shape {tuple(score.shape)}: one per image is (n,)")
    if not isinstance(score, Score | torch.Tensor):
        if not is_number(score):
            raise CAPError(
                f"evaluate gives {what} {score!r:.80}: return a number, a Score, or a tensor with one score per image"
            )
        score = float(score)
    if not math.isfinite(value_of(score)) or (isinstance(score, Score) and not 0 <= score.error < math.inf):
        raise CAPError(f"evaluate gives {what} a score that is not finite")
    return score


def value_of(score: Scored) -> float:
    """Return the score of all images together."""
    if isinstance(score, torch.Tensor):
        return float(score.mean())
    return score.value if isinstance(score, Score) else score


def size_of(score: Scored) -> int | None:
    """Return how many images there are, where that is known."""
    return len(score) if isinstance(score, torch.Tensor) else None


def error_of(differences: torch.Tensor) -> float | None:
    """Return the standard error of the mean of differences `(n,)`, image by image; None of a single one.

    Where nothing differs it is not 0, but what one image more that does would change: 1 / n.
    """
    count = len(differences)
    if count < 2:
        return None
    return standard_error(differences) if differences.any() else 1 / count


def drop_of(dense: Scored, score: Scored) -> tuple[float, float | None]:
    """Return by how much a score is lower than the dense model's, and the standard error of that where it is known."""
    drop = value_of(dense) - value_of(score)
    if type(dense) is not type(score) or size_of(dense) != size_of(score):
        raise CAPError("evaluate must score the same images in the same way each time")
    if isinstance(dense, torch.Tensor) and isinstance(score, torch.Tensor):
        differences = dense - score
        # One mean: what is equal in both is exactly 0.
        return float(differences.mean()), error_of(differences)
    if isinstance(dense, Score) and isinstance(score, Score):
        return drop, math.hypot(dense.error, score.error)
    return drop, None
