"""A dense teacher: the frozen model, and whether it fits the student."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from cap_hf.errors import CAPError, reason
from cap_hf.failures import explained, is_for_others
from cap_hf.outputs import label_names
from cap_hf.recovery.augmentation import pixel_statistics
from cap_hf.recovery.tower import Features, Tower
from cap_hf.towers import image_shape, is_classifier


class Teacher:
    """A frozen model that gives the student its targets: without gradients, in eval mode, never saved.

    Args:
        model: an image classifier with the student's labels, or of a student without a head one whose features it
            learns; it is put into eval mode and frozen.
        device: where it runs.
        bf16: run a copy of it in bfloat16; outputs come back in float32, and the model itself stays as it is.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, bf16: bool = False) -> None:
        if bf16:
            model = copy.deepcopy(model).bfloat16()
        self.model = model.eval().requires_grad_(False)
        self.model.to(device)  # type: ignore[arg-type]  # transformers' decorator makes a method without self of it
        self.tower = Tower(self.model)

    @torch.no_grad()
    def __call__(
        self, pixel_values: torch.Tensor, hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return logits `(b, classes)` and, if asked for, every hidden state, in float32."""
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        with explained(self.model, {"pixel_values": pixel_values}, image_shape):
            outputs = self.model(pixel_values=pixel_values, output_hidden_states=hidden_states)
        return outputs.logits.float(), tuple(state.float() for state in outputs.hidden_states or ())

    @torch.no_grad()
    def features(
        self, batch: Mapping[str, torch.Tensor], hidden_states: bool = False
    ) -> tuple[Features, tuple[torch.Tensor, ...]]:
        """Return the features `(b, n, d)` by part and, if asked for, every hidden state, in float32."""
        features, states = self.tower.features(taken_to(self.model, batch), hidden_states)
        return {name: each.float() for name, each in features.items()}, tuple(state.float() for state in states)


def taken_to(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch on a model's device, what is no whole number in its dtype."""
    return {
        name: each.to(model.device, model.dtype) if each.is_floating_point() else each.to(model.device)
        for name, each in batch.items()
    }


def without_head(teacher: PreTrainedModel) -> PreTrainedModel:
    """Return what of a teacher gives features: of a classifier what lies under its head, else the teacher itself."""
    return teacher.base_model if is_classifier(teacher) else teacher  # type: ignore[return-value]


def check_returns(model: PreTrainedModel, role: str) -> None:
    """Raise a CAPError if a model returns tuples, which do not say which of their parts is what."""
    if getattr(model.config, "return_dict", True) is False:
        raise CAPError(
            f"return_dict is false in the {role}'s config, and a tuple does not say which of its parts are the logits: "
            "set model.config.return_dict = True, or leave it out of config.json"
        )


def check_labels(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Raise a CAPError unless teacher and student number the same labels the same way.

    Names that transformers made up (LABEL_0 ...) say nothing and agree with any names.
    """
    advice = "choose a teacher finetuned on the same dataset"
    own_names, other_names = label_names(student), label_names(teacher)
    if len(own_names) != len(other_names):
        raise CAPError(f"the teacher has {len(other_names)} labels, the student {len(own_names)}: {advice}")
    for index in range(len(own_names)):
        own, other = str(own_names.get(index)), str(other_names.get(index))
        if own != other and f"LABEL_{index}" not in (own, other):
            raise CAPError(f"label {index} is {other!r} for the teacher and {own!r} for the student: {advice}")


def check_pixels(student: Any, teacher: Any) -> None:
    """Raise a CAPError unless two image processors normalise pixels alike: both models are given the same ones."""
    own, other = pixel_statistics(student), pixel_statistics(teacher)
    if own != other:
        raise CAPError(
            f"the teacher normalises images to mean and std {other}, the student to {own}: "
            "choose a teacher with the student's image processor"
        )


@torch.no_grad()
def check_outputs(student: PreTrainedModel, teacher: Teacher, pixel_values: torch.Tensor, hidden_states: bool) -> None:
    """Raise a CAPError unless both models take these images and, if asked for, have alike hidden states.

    Args:
        student: any mode; its mode is restored.
        teacher: of the same labels.
        pixel_values: `(1, channels, h, w)`; taken to where each model is.
        hidden_states: compare the shapes of all hidden states.
    """
    training = student.training
    student.eval()
    pixels = pixel_values.to(student.device, student.dtype)
    with explained(student, {"pixel_values": pixels}, image_shape):
        own = student(pixel_values=pixels, output_hidden_states=hidden_states).hidden_states or ()
    student.train(training)
    try:
        other = teacher(pixel_values, hidden_states)[1]
    except Exception as error:  # whatever a model raises on images of another size or number of channels
        if is_for_others(error):
            raise
        raise CAPError(f"the teacher cannot take the student's images: {reason(error)}") from error
    if hidden_states:
        check_states(student, own, other)


@torch.no_grad()
def check_features(student: Tower, teacher: Teacher, batch: Mapping[str, torch.Tensor], hidden_states: bool) -> None:
    """Raise a CAPError unless both models take these images and have alike features and, if asked for, hidden states.

    Args:
        student: of a model in any mode; its mode is restored.
        teacher: whose features it is to learn.
        batch: of one image; taken to where each model is.
        hidden_states: compare the shapes of all hidden states.
    """
    model = student.model
    own, own_states = features_of_one(student, batch, hidden_states)
    try:
        other, states = teacher.features(batch, hidden_states)
    except Exception as error:  # whatever a model raises on images of another size or number of channels
        if is_for_others(error):
            raise
        raise CAPError(f"the teacher cannot take the student's images: {reason(error)}") from error
    advice = "choose the dense model that the student was pruned from, or one of its architecture"
    for name, each in own.items():
        if name not in other:
            raise CAPError(f"the teacher gives {' and '.join(other)} features, and none to learn {name} from: {advice}")
        mine, yours = tuple(each.shape[1:]), tuple(other[name].shape[1:])
        if mine != yours:
            raise CAPError(f"{name} features are {yours} in the teacher and {mine} in the student: {advice}")
    if hidden_states:
        check_states(model, own_states, states)


def has_states(student: Tower, batch: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a model of images gives its hidden states; some of timm's refuse to."""
    try:
        return bool(features_of_one(student, batch, True)[1])
    except CAPError:
        # Whatever else it fails on is no matter of its hidden states.
        features_of_one(student, batch, False)
        return False


@torch.no_grad()
def features_of_one(
    student: Tower, batch: Mapping[str, torch.Tensor], hidden_states: bool
) -> tuple[Features, tuple[torch.Tensor, ...]]:
    """Return the features of a batch's first image, as the model gives them in evaluation, and its hidden states."""
    model = student.model
    training = model.training
    model.eval()
    try:
        return student.features({name: each[:1] for name, each in taken_to(model, batch).items()}, hidden_states)
    finally:
        model.train(training)


def check_states(student: PreTrainedModel, own: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    """Raise a CAPError unless the student has hidden states `(b, ...)`, and the teacher as many of the same shapes."""
    shapes = [[tuple(state.shape[1:]) for state in states] for states in (own, other)]
    if not own:
        raise CAPError(f"{type(student).__name__} has no hidden states to match: set --hidden_state_weight 0")
    advice = "set --hidden_state_weight 0 or choose a teacher of the student's architecture"
    if len(own) != len(other):
        raise CAPError(f"the teacher has {len(other)} hidden states, the student {len(own)}: {advice}")
    for index, (mine, yours) in enumerate(zip(*shapes, strict=True)):
        if mine != yours:
            raise CAPError(f"hidden state {index} is {yours} in the teacher and {mine} in the student: {advice}")
