"""A dense teacher: the frozen model, and whether it fits the student."""

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from cap_hf.errors import CAPError, reason
from cap_hf.outputs import label_names
from cap_hf.recovery.augmentation import pixel_statistics


class Teacher:
    """A frozen model that gives the student its targets: without gradients, in eval mode, never saved.

    Args:
        model: an image classifier with the student's labels; it is put into eval mode and frozen.
        device: where it runs.
        bf16: run a copy of it in bfloat16; outputs come back in float32, and the model itself stays as it is.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, bf16: bool = False) -> None:
        if bf16:
            model = copy.deepcopy(model).bfloat16()
        self.model = model.eval().requires_grad_(False)
        self.model.to(device)  # type: ignore[arg-type]  # transformers' decorator makes a method without self of it

    @torch.no_grad()
    def __call__(
        self, pixel_values: torch.Tensor, hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return logits `(b, classes)` and, if asked for, every hidden state, in float32."""
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        outputs = self.model(pixel_values=pixel_values, output_hidden_states=hidden_states)
        return outputs.logits.float(), tuple(state.float() for state in outputs.hidden_states or ())


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
    own = student(pixel_values=pixels, output_hidden_states=hidden_states).hidden_states or ()
    student.train(training)
    try:
        other = teacher(pixel_values, hidden_states)[1]
    except Exception as error:  # whatever a model raises on images of another size or number of channels
        raise CAPError(f"the teacher cannot take the student's images: {reason(error)}") from error
    shapes = [[tuple(state.shape[1:]) for state in states] for states in (own, other)]
    advice = "leave out --hidden_state_weight or choose a teacher of the student's architecture"
    if hidden_states and not own:
        raise CAPError(f"{type(student).__name__} has no hidden states to match: leave out --hidden_state_weight")
    if len(own) != len(other):
        raise CAPError(f"the teacher has {len(other)} hidden states, the student {len(own)}: {advice}")
    for index, (mine, yours) in enumerate(zip(*shapes, strict=True)):
        if mine != yours:
            raise CAPError(f"hidden state {index} is {yours} in the teacher and {mine} in the student: {advice}")
