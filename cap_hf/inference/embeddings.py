"""What comes before the blocks of an optimised model: patches of images in int8, and positions that are kept."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from cap_hf.inference.choice import MARGIN, RUNS, SECONDS, time_in_turns
from cap_hf.inference.int8_packing import PackedInt8Weight, is_quantizable, pack_int8
from cap_hf.inference.operators import int8_arguments, number_of, run
from cap_hf.models import uncompiled
from cap_hf.towers import see

# How many sizes of images a module keeps the embeddings of positions of.
MOST_SIZES = 8


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
        name = "interpolate_pos_encoding"
        if callable(getattr(type(module), name, None)) and name not in vars(module):
            vars(module)[name] = functools.partial(positions, module, {})


def find_patches(model: nn.Module, example: Mapping[str, torch.Tensor]) -> dict[nn.Conv2d, torch.Tensor]:
    """Return the convolutions that cut images into patches which do not overlap, each with the images it got."""
    tensors = [each for each in example.values() if isinstance(each, torch.Tensor) and each.dim() == 4]
    images = [each.untyped_storage().data_ptr() for each in tensors]
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

    What is written through a parameter's `.data` is not seen, by PyTorch neither. Of tensors that were made in
    inference mode nothing is known: they are never unchanged.

    Args:
        parameters: of a module.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], holds: bool = True) -> None:
        self.parameters = list(parameters)
        self.before = self.now() if holds else None

    def now(self) -> list[tuple[int, int]] | None:
        """Return where each parameter is, and how often it was written to; None where that is not known."""
        if any(each.is_inference() for each in self.parameters):
            return None
        return [(each.data_ptr(), each._version) for each in self.parameters]

    def holds(self, parameters: Iterable[torch.Tensor | None]) -> bool:
        """Return whether these are the parameters, and as they were."""
        found = [each for each in parameters if each is not None]
        same = len(found) == len(self.parameters) and all(map(operator.is_, found, self.parameters))
        return same and self.before is not None and self.now() == self.before

    def __reduce__(self) -> tuple[Any, ...]:
        return Unchanged, (self.parameters, self.holds(self.parameters))


def is_plain() -> bool:
    """Return whether a call only computes: nothing is traced or mapped, and no gradients are wanted."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _len_torch_dispatch_stack()
    )


def sparse_int8_patches(
    x: torch.Tensor,
    weight: PackedInt8Weight,
    bias: torch.Tensor | None,
    patch_size: tuple[int, int],
    instruction_set: str = "",
) -> torch.Tensor:
    """Return `sparse_int8_linear` of the patches of images, `(images, patches, rows)` in x's dtype.

    Args:
        x: `(images, channels, height, width)`, float32, float16 or bfloat16, on the CPU. What is left of an image right
            of and below its patches is not looked at.
        weight: of a convolution `(rows, channels * patch height * patch width)`, quantised and packed.
        bias: `(rows,)`.
        patch_size: height and width.
        instruction_set: as of `sparse_int8_linear`.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
    """
    layer = int8_arguments(weight, bias)
    return run(torch.ops.cap_hf.sparse_int8_patches, x, *layer, *patch_size, number_of(instruction_set))


def patches(
    convolution: nn.Conv2d, weight: PackedInt8Weight, unchanged: Unchanged, input: torch.Tensor
) -> torch.Tensor:
    """Return what a convolution that cuts patches returns `(images, rows, down, across)`, in int8.

    As it is where gradients are wanted, a compiler looks, or its weight is no longer the one that was quantised.

    Args:
        convolution: one that `cuts_patches`.
        weight: its weight, quantised.
        unchanged: of its parameters then.
        input: `(images, channels, height, width)`.
    """
    plain = is_plain() and input.dim() == 4 and input.device.type == "cpu" and input.dtype == torch.float32
    (height, width) = convolution.kernel_size
    if (
        not plain
        or not unchanged.holds(convolution._parameters.values())
        or input.shape[2] < height
        or input.shape[3] < width
    ):
        return nn.Conv2d.forward(convolution, input)
    across = input.shape[3] // width
    y = sparse_int8_patches(input, weight, convolution.bias, (height, width))
    return y.transpose(1, 2).unflatten(2, (input.shape[2] // height, across))


def positions(module: nn.Module, kept: dict[Any, Any], /, *given: Any, **named: Any) -> Any:
    """Return a module's embeddings of positions for images of some size: those of the last sizes are kept.

    Models of transformers compute them from their parameters and the size; that nothing else of the input takes part is
    tried at the first call for a size.

    Args:
        module: whose method `interpolate_pos_encoding` it is.
        kept: by what it was made of what it returned, or None where that depends on the embeddings, and `Unchanged`.
        given, named: as that method takes them.
    """
    kind: Any = type(module)
    original = functools.partial(kind.interpolate_pos_encoding, module)
    embeddings, *args = given or (None,)
    sizes_alone = isinstance(embeddings, torch.Tensor) and not named and all(isinstance(each, int) for each in args)
    if not sizes_alone or not is_plain():
        return original(*given, **named)
    made_of = (embeddings.shape[1:], embeddings.dtype, embeddings.device, *args)
    found, unchanged = kept.get(made_of, (None, None))
    # Of children too, where positions may be those of an Embedding.
    parameters = [*module.parameters(), *module.buffers()]
    if unchanged is None or not unchanged.holds(parameters):
        found = original(embeddings, *args)
        same = torch.equal(found, original(torch.zeros_like(embeddings), *args))
        if len(kept) == MOST_SIZES:
            kept.clear()
        kept[made_of] = found.clone() if same else None, Unchanged(parameters)
        return found
    # A copy, which may be written to.
    return original(embeddings, *args) if found is None else found.clone()
