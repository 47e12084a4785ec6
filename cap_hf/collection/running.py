"""Takes calibration examples through a model that nothing else is to notice: frozen, in eval mode, restored."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cap_hf.method.losses import cross_entropy
from cap_hf.outputs import logits_of

# What switches activations to being computed again in the backward pass: transformers' name for it, and timm's, whose
# models do so in eval mode too.
RECOMPUTES = ("gradient_checkpointing", "grad_checkpointing")

# `pixel_values` and, unless they are sampled, `labels`; each `(b, ...)`.
Batch = dict[str, torch.Tensor]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, with parameters that need no gradient, and put both back afterwards.

    Gradients of activations alone are needed, and `.grad` of the parameters is nobody's business here. Nothing is
    computed again in the backward pass: hooks would meet it twice, or, where no parameter needs a gradient, not at all.
    """
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    recomputing = [
        (module, name) for module in model.modules() for name in RECOMPUTES if getattr(module, name, False) is True
    ]
    model.eval().requires_grad_(False)
    for module, name in recomputing:
        setattr(module, name, False)
    try:
        yield
    finally:
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        for module, mode in training.items():
            module.training = mode
        for module, name in recomputing:
            setattr(module, name, True)


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the logits `(b, classes)` of a batch.

    Raises:
        CAPError: the model returns none.
    """
    return logits_of(model(**{name: value for name, value in batch.items() if name != "labels"}))


def backward(model: nn.Module, batch: Batch, uniforms: torch.Tensor | None, group: int = 1) -> torch.Tensor:
    """Take a batch through a frozen model forward and backward; return the summed loss.

    Args:
        model: within `frozen`, with hooks on the layers whose gradients are wanted.
        batch: `b` examples.
        uniforms: `(b,)` for labels that are sampled from the model, None for the batch's own.
        group: how many examples a gradient sample is the mean over; the loss is divided by it.

    Raises:
        CAPError: the model returns no logits, or a label is none of its classes.
    """
    with torch.enable_grad():
        loss = cross_entropy(forward(model, batch), batch.get("labels"), uniforms) / group
    if loss.requires_grad:
        loss.backward()
    return loss.detach()
