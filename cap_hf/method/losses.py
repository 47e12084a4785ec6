"""The loss whose gradients make the Fisher: cross entropy with the data's labels or with the model's own."""

import torch
from torch.nn import functional as F

from cap_hf.errors import CAPError


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor | None, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Return the cross entropy summed over examples (arXiv 2210.09223, section 2, the loss L of the empirical Fisher).

    Args:
        logits: `(b, classes)`.
        labels: `(b,)`, not looked at where `uniforms` are given; None only there.
        uniforms: None for the data's labels; else see `sample_labels`.

    Raises:
        CAPError: a label is none of the classes, or there are neither labels nor uniforms.
    """
    if uniforms is not None:
        labels = sample_labels(logits, uniforms)
    elif labels is None:
        raise CAPError("a batch has no labels: add them, or use fisher_type='sampled', which needs none")
    else:
        check_labels(labels, logits.shape[-1])
    return F.cross_entropy(logits.float(), labels.long(), reduction="sum")


def sample_labels(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return labels `(b,)` drawn from the model's own distribution, by inverting its cumulative sum.

    With them the Fisher is the true one of the model (Kunstner et al., arXiv 1905.12558, section 2), not the empirical.

    Args:
        logits: `(b, classes)`.
        uniforms: `(b,)` in [0, 1), one number per example.
    """
    cumulative = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms.to(cumulative)[:, None])[:, 0]
    return drawn.clamp_max(logits.shape[-1] - 1)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raise a CAPError if a label is none of the classes, -100 among them, which training would pass over."""
    if labels.is_floating_point() or labels.dim() != 1:
        raise CAPError(f"labels must be whole numbers (b,), one per example, not {labels.dtype} {tuple(labels.shape)}")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise CAPError(
            f"a calibration example has label {int(labels[wrong][0])}, the model has classes 0 to {classes - 1}: leave "
            "examples without a label out, or use fisher_type='sampled', which needs none"
        )
