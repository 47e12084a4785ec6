"""What comes before the blocks of an optimised model: patches of images in int8, and positions that are kept."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cap_hf.inference.choice import MARGIN, RUNS, SECONDS, time_in_turns
from cap_hf.inference.int8_packing import PackedInt8Weight, is_quantizable, pack_int8
from cap_hf.inference.operators import sparse_int8_patches
from cap_hf.models import uncompiled
from cap_hf.towers import see


def speed_up_embeddings(model: nn.Module, example: Mapping[str, torch.Tensor]) -> None:
    """Let a model compute its patches in int8 where that is measured to be faster, and its positions once per size.

    Args:
        model: with convolutions as they were trained.
        example: what the model is called with, once.
    """
    for convolution, pixels in find_patches(model, example).items():
        weight = pack_int8(convolution.weight.detach().flatten(1))
        new = functools.partial(patches, convolution, weight, Unchanged(convolution.parameters()))
        with torch.inference_mode():
            calls: list[Callable[[], Any]] = [functools.partial(each, pixels) for each in (convolution, new)]
            before, after = (min(each) for each in time_in_turns(calls, RUNS, SECONDS))
        if after < MARGIN * before:
            # As attributes of their own: modules take names for parameters and children.
            vars(convolution)["forward"] = new
            held = [each for each in vars(weight).values() if isinstance(each, torch.Tensor)]
            vars(convolution)["extra_bytes"] = sum(each.numel() * each.element_size() for each in held)
    for module in model.modules():
        if callable(getattr(type(module), "interpolate_pos_encoding", None)):
            vars(module)["interpolate_pos_encoding"] = functools.partial(positions, module, {})


def find_patches(model: nn.Module, example: Mapping[str, torch.Tensor]) -> dict[nn.Conv2d, torch.Tensor]:
    """Return the convolutions that cut images into patches which do not overlap, each with the images it got."""
    images = [each.untyped_storage().data_ptr() for each in example.values() if each.dim() == 4]
    found: dict[nn.Conv2d, torch.Tensor] = {}

    def entered(module: nn.Conv2d, args: tuple) -> None:
        if args and args[0].untyped_storage().data_ptr() in images:
            found[module] = args[0]

    candidates = [module for module in model.modules() if type(module) is nn.Conv2d and cuts_patches(module)]
    handles = [module.register_forward_pre_hook(entered) for module in candidates]
    try:
        with uncompiled(model), torch.inference_mode():
            see(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def cuts_patches(convolution: nn.Conv2d) -> bool:
    """Return whether a convolution multiplies each number of an image once, and can be computed in int8."""
    return (
        convolution.kernel_size == convolution.stride
        and convolution.padding in ((0, 0), "valid")
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.weight.dtype == torch.float32
        and convolution.weight.device.type == "cpu"
        and "forward" not in vars(convolution)
        and is_quantizable(convolution.weight.detach().flatten(1))
    )


class Unchanged:
    """Tells whether parameters are still what they were when it was made; a copy tells it of the copied ones.

    What is written through a parameter's `.data` is not seen, by PyTorch neither.

    Args:
        parameters: of a module.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], holds: bool = True) -> None:
        self.parameters = list(parameters)
        self.before = self.now() if holds else []

    def now(self) -> list[tuple[int, int]]:
        """Return where each parameter is, and how often it was written to."""
        return [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in self.parameters]

    def holds(self, parameters: Iterable[nn.Parameter | None]) -> bool:
        """Return whether these are the parameters, and as they were."""
        found = [each for each in parameters if each is not None]
        same = len(found) == len(self.parameters) and all(map(operator.is_, found, self.parameters))
        return same and self.now() == self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return Unchanged, (self.parameters, self.now() == self.before)


def is_plain() -> bool:
    """Return whether a call only computes: nothing is traced, and no gradients are wanted."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def patches(convolution: nn.Conv2d, weight: PackedInt8Weight, unchanged: Unchanged, x: torch.Tensor) -> torch.Tensor:
    """Return what a convolution that cuts patches returns `(images, rows, down, across)`, in int8.

    As it is where gradients are wanted, a compiler looks, or its weight is no longer the one that was quantised.

    Args:
        convolution: one that `cuts_patches`.
        weight: its weight, quantised.
        unchanged: of its parameters then.
        x: `(images, channels, height, width)`.
    """
    plain = is_plain() and x.dim() == 4 and x.device.type == "cpu" and x.dtype == torch.float32
    if not plain or not unchanged.holds(convolution._parameters.values()):
        return nn.Conv2d.forward(convolution, x)
    (height, width), across = convolution.kernel_size, x.shape[3] // convolution.kernel_size[1]
    y = sparse_int8_patches(x, weight, convolution.bias, (height, width))
    return y.transpose(1, 2).unflatten(2, (x.shape[2] // height, across))


def positions(module: nn.Module, kept: dict[Any, Any], embeddings: torch.Tensor, *args: Any, **named: Any) -> Any:
    """Return a module's embeddings of positions for images of some size: those of the last size are kept.

    Models of transformers compute them from their parameters and the size; that nothing else of the input takes part is
    tried at the first call for a size.

    Args:
        module: whose method `interpolate_pos_encoding` it is.
        kept: by what it was made of what it returned, or None where that depends on the embeddings, and `Unchanged`.
        embeddings, args, named: as that method takes them.
    """
    kind: Any = type(module)
    original = functools.partial(kind.interpolate_pos_encoding, module)
    if not is_plain() or named or not all(isinstance(each, int) for each in args):
        return original(embeddings, *args, **named)
    made_of = (embeddings.shape[1:], embeddings.dtype, embeddings.device, *args)
    found, unchanged = kept.get(made_of, (None, None))
    # Of children too, where positions may be those of an Embedding.
    parameters = list(module.parameters())
    if unchanged is None or not unchanged.holds(parameters):
        found = original(embeddings, *args)
        same = torch.equal(found, original(torch.zeros_like(embeddings), *args))
        kept.clear()
        kept[made_of] = found if same else None, Unchanged(parameters)
    return original(embeddings, *args) if found is None else found
