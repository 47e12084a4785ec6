"""What a model learns when it recovers: labels and a teacher's logits, or the features of a teacher."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_labels

from cap_hf.errors import CAPError
from cap_hf.recovery.distillation import (
    Teacher,
    check_features,
    check_labels,
    check_outputs,
    check_returns,
    has_states,
    without_head,
)
from cap_hf.recovery.losses import (
    NO_LABEL,
    feature_loss,
    hidden_state_loss,
    label_loss,
    logit_loss,
    student_logits,
)
from cap_hf.recovery.tower import Tower
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.towers import is_classifier

logger = logging.getLogger(__name__)

# A batch as a model is called with it: `pixel_values`, and what else its image processor makes.
Inputs = Mapping[str, torch.Tensor]


class Objective(Protocol):
    """The loss of a batch.

    Attributes:
        teacher: what is learned from beside labels, or None.
    """

    teacher: Teacher | None

    def check(self, inputs: Inputs) -> None:
        """Raise a CAPError unless student and teacher fit together on these inputs, of one image."""
        ...

    def __call__(
        self, model: nn.Module, inputs: Inputs, labels: torch.Tensor | None, recovering: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch, a mean over its examples, and what the model made of it.

        Args:
            model: the student, as it is wrapped for training.
            inputs: of the batch.
            labels: `(b,)` or `(b, classes)`, None for images alone.
            recovering: False in evaluation, which measures one part of the loss.
        """
        ...


@dataclass
class LabelObjective:
    """Of a classifier: cross entropy with labels, divergence from a teacher's logits, error of its hidden states.

    Evaluation measures the labels alone, and the divergence where there are none.
    """

    student: PreTrainedModel
    teacher: Teacher | None
    args: SparseTrainingArguments
    label_smoothing: float

    def check(self, inputs: Inputs) -> None:
        """Raise a CAPError as `check_outputs` does."""
        if self.teacher is not None:
            check_outputs(self.student, self.teacher, inputs["pixel_values"], bool(self.args.hidden_state_weight))

    def __call__(
        self, model: nn.Module, inputs: Inputs, labels: torch.Tensor | None, recovering: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and the logits.

        Raises:
            CAPError: there are neither labels nor a teacher.
        """
        args, teacher, pixels = self.args, self.teacher, inputs["pixel_values"]
        if labels is None and teacher is None:
            raise CAPError("a batch has no labels and there is no teacher: add labels, or name a teacher to learn from")
        matches_hidden = recovering and teacher is not None and bool(args.hidden_state_weight)
        outputs = model(**inputs, output_hidden_states=matches_hidden)
        smoothing = self.label_smoothing if recovering else 0.0
        if teacher is None or not (recovering or labels is None):
            assert labels is not None  # without a teacher there are some
            return label_loss(outputs["logits"], labels, smoothing), {"logits": outputs["logits"]}
        hard, soft = student_logits(outputs)
        if not args.hard_label_weight:
            # No head of two learns labels: what they say together learns from the teacher.
            soft = outputs["logits"]
        targets, states = teacher(pixels, matches_hidden)
        loss = logit_loss(soft, targets, args.distillation_temperature)
        if recovering:
            if labels is None:
                labels = torch.full((len(pixels),), NO_LABEL, device=pixels.device)
            loss = args.hard_label_weight * label_loss(hard, labels, smoothing) + args.distillation_weight * loss
        if matches_hidden:
            loss = loss + (args.hidden_state_weight or 0) * hidden_state_loss(outputs["hidden_states"], states)
        return loss, {"logits": outputs["logits"]}


@dataclass
class FeatureObjective:
    """Of a model without a head: the error of a teacher's features and of its hidden states; labels say nothing.

    Evaluation measures the features alone. A weight of the hidden states that is None becomes 1, or 0 of a model that
    has none.
    """

    student: Tower
    teacher: Teacher
    feature_weight: float
    hidden_state_weight: float | None

    def check(self, inputs: Inputs) -> None:
        """Raise a CAPError as `check_features` does."""
        check_features(self.student, self.teacher, inputs, self.weight_of_states(inputs) > 0)

    def weight_of_states(self, inputs: Inputs) -> float:
        """Return the weight of the hidden states, found out on one image where nobody said it."""
        if self.hidden_state_weight is None:
            self.hidden_state_weight = 1.0 if has_states(self.student, inputs) else 0.0
            if not self.hidden_state_weight:
                kind = type(self.student.model).__name__
                logger.warning("%s gives no hidden states: it learns the features alone.", kind)
        return self.hidden_state_weight

    def __call__(
        self, model: nn.Module, inputs: Inputs, labels: torch.Tensor | None, recovering: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and the features, by part."""
        weight = self.weight_of_states(inputs)
        matches_hidden = recovering and weight > 0
        own, own_states = self.student.features(inputs, matches_hidden, through=model)
        other, other_states = self.teacher.features(inputs, matches_hidden)
        loss = feature_loss(own, other)
        if recovering:
            loss = self.feature_weight * loss
        if matches_hidden:
            loss = loss + weight * hidden_state_loss(own_states, other_states)
        return loss, own


def make_objective(
    model: PreTrainedModel, teacher: PreTrainedModel | None, args: SparseTrainingArguments, label_smoothing: float
) -> LabelObjective | FeatureObjective:
    """Return what a model learns: labels where it has classes, else a teacher's features.

    Args:
        model: the student.
        teacher: dense, or None.
        args: weights of the parts, and where and how the teacher runs.
        label_smoothing: of the cross entropy.

    Raises:
        CAPError: the model has nothing to learn from, or the teacher's labels are others.
    """
    if teacher is not None:
        check_returns(teacher, "teacher")
    # What is trained for another task, such as segmentation, has a loss of its own if it takes labels.
    if is_classifier(model) or (teacher is None and find_labels(type(model))):
        if not (args.distillation_weight or args.hidden_state_weight):
            teacher = None
        if teacher is not None:
            check_labels(model.config, teacher.config)
        made = None if teacher is None else Teacher(teacher, args.device, args.teacher_bf16)
        return LabelObjective(model, made, args, label_smoothing)
    kind = type(model).__name__
    if teacher is None:
        raise CAPError(f"{kind} has no head to learn labels with: name a teacher, whose features it learns")
    if args.feature_weight == args.hidden_state_weight == 0:
        raise CAPError(f"feature_weight and hidden_state_weight are 0, and {kind} has nothing else to learn from")
    made = Teacher(without_head(teacher), args.device, args.teacher_bf16)
    return FeatureObjective(Tower(model), made, args.feature_weight, args.hidden_state_weight)
