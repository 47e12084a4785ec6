"""Takes calibration examples through a model that nothing else is to notice: frozen, in eval mode, restored."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import DataLoader

from cap_hf.errors import CAPError
from cap_hf.method.losses import FisherLoss
from cap_hf.models import full_precision, uncompiled
from cap_hf.towers import see

# What switches activations to being computed again in the backward pass: transformers' name for it, and timm's, whose
# models do so in eval mode too.
RECOMPUTES = ("gradient_checkpointing", "grad_checkpointing")

# `pixel_values` and what else the model is called with, and `labels` where there are some; each `(b, ...)`.
Batch = dict[str, torch.Tensor]
# What examples come from: a DataLoader, or anything that yields batches.
Batches = DataLoader | Iterable[Batch]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside the context there can be gradients, also where the caller is inside `torch.inference_mode()`.

    Raises:
        CAPError: the model was made in that mode, which no gradient goes through.
    """
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise CAPError("the model was made inside torch.inference_mode(), where nothing has gradients: load it outside")
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, with parameters that need no gradient, and put both back afterwards.

    Gradients of activations alone are needed, and `.grad` of the parameters is nobody's business here. Nothing is
    computed again in the backward pass: hooks would meet it twice, or, where no parameter needs a gradient, not at all.
    Nothing runs compiled, which would pass over them, and nothing in half precision, for which the gradients of single
    examples are too small.
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
        with uncompiled(model), full_precision(model):
            yield
    finally:
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
        for module, mode in training.items():
            module.training = mode
        for module, name in recomputing:
            setattr(module, name, True)


class Remembered:
    """Some tensors of a model, and what they held.

    Args:
        tensors: parameters or buffers.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.values = {tensor: tensor.detach().clone() for tensor in tensors}

    @torch.no_grad()
    def put_back(self) -> None:
        """Have the tensors hold again what they held."""
        for tensor, value in self.values.items():
            tensor.copy_(value)


@contextmanager
def unchanged_on_error(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Put some tensors back if something fails."""
    before = Remembered(tensors)
    try:
        yield
    except BaseException:
        before.put_back()
        raise


def backward(
    model: nn.Module, batch: Batch, loss: FisherLoss, draws: torch.Tensor | None = None, group: int = 1
) -> torch.Tensor:
    """Take a batch through a frozen model forward and backward; return the summed loss.

    Args:
        model: within `frozen`, with hooks on the layers whose gradients are wanted.
        batch: `b` examples.
        loss: whose gradients they are.
        draws: `(b,)`, what is random in the loss of each example; None where nothing is.
        group: how many examples a gradient sample is the mean over; the loss is divided by it.

    Raises:
        CAPError: the model does not return what the loss is made from, or a label is none of its classes.
    """
    with torch.enable_grad():
        value = loss(see(model, batch), batch.get("labels"), draws) / group
    if value.requires_grad:
        value.backward()
    return value.detach()
