"""What a recovery learns from: the labels, a teacher's logits, its features and its hidden states."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

# The label of an example that has none, as everywhere in PyTorch and transformers.
NO_LABEL = -100


def label_shares(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Return labels `(b,)` as shares of each class `(b, num_labels)`; all 0 where the label is -100."""
    missing = labels == NO_LABEL
    return F.one_hot(labels.masked_fill(missing, 0), num_labels).float().masked_fill(missing[:, None], 0)


def label_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross entropy with the labels, mean over the examples that have one; 0 if none has.

    Args:
        logits: `(b, classes)`.
        labels: `(b,)` class numbers with -100 for no label, or `(b, classes)` shares, which a mixture with an example
            without a label has less than 1 of.
        label_smoothing: share of every label that is spread over all classes.
    """
    logits = logits.float()
    if labels.dim() == 1:
        if (labels == NO_LABEL).all():
            return logits.sum() * 0
        return F.cross_entropy(logits, labels, ignore_index=NO_LABEL, label_smoothing=label_smoothing)
    labelled = labels.sum(dim=1)
    targets = (1 - label_smoothing) * labels + label_smoothing / labels.shape[1] * labelled[:, None]
    total = labelled.sum()
    return F.cross_entropy(logits, targets, reduction="sum") / torch.where(total > 0, total, 1)


def logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return `T^2 KL(teacher || student)` of softened distributions, mean over examples (Hinton, arXiv 1503.02531).

    The square keeps the size of the gradients when the temperature changes. Both logits are `(b, classes)`.
    """
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def hidden_state_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `|s - t|^2 / |t|^2`, mean over layers: the normalised MSE (SquareHead, arXiv 2310.06927).

    Normalised because hidden states grow with depth: without it the last layers would be all that counts.
    """
    losses = [
        F.mse_loss(own.float(), other) / other.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def feature_loss(student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the share of a teacher's features that the student misses: `|s - t|^2 / |t - mean t|^2`, mean over parts.

    The mean is each channel's, over the images and positions of the batch. What all images have in common tells none
    from another and would only make the error look small; of a student that gives every image the same mean the loss
    is 1. Channels are not scaled one by one, as those who compare features by distance or cosine do not scale them.

    Args:
        student: `(b, n, d)` of each part.
        teacher: the same parts, or more. The variance is the unbiased one, so that the loss does not depend on the size
            of the batch; where there is one image and one position, which has none, `|t|^2` takes its place.
    """
    losses = []
    for name, part in student.items():
        own, target = part.float().flatten(0, 1), teacher[name].float().flatten(0, 1)
        spread = target.var(dim=0) if len(target) > 1 else target.square()
        losses.append(F.mse_loss(own, target) / spread.mean().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(losses).mean()


def student_logits(outputs: ModelOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that learn from labels and those that learn from the teacher, each `(b, classes)`.

    A model with DeiT's distillation token has a head for each (arXiv 2012.12877, section 4); any other has one.
    """
    if "distillation_logits" in outputs:
        return outputs["cls_logits"], outputs["distillation_logits"]
    return outputs["logits"], outputs["logits"]
