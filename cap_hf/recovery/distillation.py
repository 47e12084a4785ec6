"""Learning from a dense teacher: its logits at a temperature and its hidden states."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from cap_hf.errors import CAPError, reason


class Teacher:
    """A frozen model that gives the student its targets: without gradients, in eval mode, never saved.

    Args:
        model: an image classifier with the student's labels; it is put into eval mode and frozen.
        device: where it runs.
        bf16: run it in bfloat16; its outputs come back in float32.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, bf16: bool = False) -> None:
        self.model = model.to(device=device, dtype=torch.bfloat16 if bf16 else None).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, pixel_values: torch.Tensor, hidden_states: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Logits `(b, classes)` and, if asked for, every hidden state, in float32."""
        outputs = self.model(pixel_values=pixel_values.to(self.model.dtype), output_hidden_states=hidden_states)
        return outputs.logits.float(), tuple(state.float() for state in outputs.hidden_states or ())


def logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """`T^2 KL(teacher || student)` of softened distributions, mean over examples (Hinton, arXiv 1503.02531).

    The square keeps the size of the gradients when the temperature changes. Both logits are `(b, classes)`.
    """
    student = F.log_softmax(student.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def hidden_state_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """`|s - t|^2 / |t|^2`, mean over layers: the normalised MSE (SquareHead, arXiv 2310.06927).

    Normalised because hidden states grow with depth: without it the last layers would be all that counts.
    """
    losses = [
        F.mse_loss(own.float(), other) / other.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def student_logits(outputs: ModelOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that learn from labels and those that learn from the teacher, each `(b, classes)`.

    A model with DeiT's distillation token has a head for each (arXiv 2012.12877, section 4); any other has one.
    """
    if "distillation_logits" in outputs:
        return outputs["cls_logits"], outputs["distillation_logits"]
    return outputs["logits"], outputs["logits"]


def check_labels(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Raise a CAPError unless teacher and student number the same labels the same way.

    Names that transformers made up (LABEL_0 ...) say nothing and agree with any names.
    """
    advice = "choose a teacher finetuned on the same dataset"
    if student.num_labels != teacher.num_labels:
        raise CAPError(f"the teacher has {teacher.num_labels} labels, the student {student.num_labels}: {advice}")
    for index in range(student.num_labels):
        own, other = str(student.id2label.get(index)), str(teacher.id2label.get(index))
        if own != other and f"LABEL_{index}" not in (own, other):
            raise CAPError(f"label {index} is {other!r} for the teacher and {own!r} for the student: {advice}")


@torch.no_grad()
def check_outputs(student: PreTrainedModel, teacher: Teacher, pixel_values: torch.Tensor, hidden_states: bool) -> None:
    """Raise a CAPError unless both models take these images and, if asked for, have alike hidden states.

    Args:
        student: any mode; its mode is restored.
        teacher: on the student's device.
        pixel_values: `(1, channels, h, w)`.
        hidden_states: compare the shapes of all hidden states.
    """
    training = student.training
    student.eval()
    own = student(pixel_values=pixel_values, output_hidden_states=hidden_states).hidden_states or ()
    student.train(training)
    try:
        other = teacher(pixel_values, hidden_states)[1]
    except (ValueError, RuntimeError) as error:
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
