"""Put sparse layers in the place of the Linear layers of a transformers model: `optimize_for_inference`."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import BaseImageProcessor

from cap_hf.checkpoints.int8 import is_pruned
from cap_hf.errors import CAPError
from cap_hf.inference.attention import speed_up_attention
from cap_hf.inference.blocks import fuse_blocks
from cap_hf.inference.choice import Kind, fastest_kind, is_faster, is_semi_structured_faster
from cap_hf.inference.embeddings import speed_up_embeddings
from cap_hf.inference.example import check_example, make_example
from cap_hf.inference.fusion import find_gelus, find_mlps, fuse_gelus, fuse_mlps
from cap_hf.inference.int8_linear import SparseInt8Linear
from cap_hf.inference.int8_packing import is_quantizable
from cap_hf.inference.linear import (
    CSRLinear,
    SparseLinear,
    SparseWeightLinear,
    StoredInt8Linear,
    carry_hooks,
    dtype_of,
    stored_weight,
)
from cap_hf.inference.operators import has_int8_kernel, has_kernel
from cap_hf.inference.semi_structured import find_semi_structured, to_semi_structured
from cap_hf.kernels.build import DISABLE_VARIABLE, are_disabled
from cap_hf.models import uncompiled, usable
from cap_hf.towers import see

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "kernel", "csr", "semi_structured")
DTYPES = ("float32", "int8")

Model = TypeVar("Model", bound=nn.Module)


def optimize_for_inference(
    model: Model,
    backend: str = "auto",
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    image_processor: BaseImageProcessor | None = None,
    image_size: int | Sequence[int] | None = None,
    dtype: str = "float32",
) -> Model:
    """Replace the sparse Linear layers of a model, in place, by layers that multiply the non-zero weights only.

    Everything else of the model stays as it is: names, hooks, `pipeline`, `torch.compile`, `torch.export`. Its
    state_dict and `save_pretrained` give the dense weights. The replaced weights' memory is given back. A layer that
    is replaced cannot be trained: a backward pass through it is an error.

    Args:
        model: a transformers model (or any module), on the CPU in float32, or on a GPU in half precision.
        backend: 'auto' replaces a layer where that is measured to be faster, and leaves the others dense. On the CPU
            it takes the C++ kernel, or PyTorch's CSR product where there is no compiler; on a GPU the 2:4 product.
            'kernel', 'csr' and 'semi_structured' name one of these, which replaces all layers it can, faster or not.
        example_inputs: what the model is called with some times, to see how many tokens each layer gets, where a GELU
            or an MLP can be computed in one layer, and whether attention is faster in int8; default: one image. Paths
            that the model takes for other inputs only are not seen.
        image_processor: that decides the size of this image; default: the one beside the checkpoint that the model was
            loaded from, if it is on this machine.
        image_size: height and width of this image, or one number for both, in the place of what the image processor
            says. Where there is neither, the config says it.
        dtype: 'float32', or 'int8', which changes results a little: weights get one scale per row, and what goes into
            a layer one scale per token, for each input anew. 'auto' then takes the fastest of sparse int8, dense
            int8, sparse float32 and dense for each layer, and the faster attention, in int8 or as it is; 'kernel'
            takes sparse int8 for all layers; the others know no int8.
            Only layers of which at least 1 % is zeros are replaced: heads and embeddings, to which accuracy is most
            sensitive and which cap_hf never prunes, stay float32, unless something else has pruned them; but patches
            of images are multiplied in int8 where that is faster, and blocks computed at once. Sparse int8
            gains from whole groups of four consecutive inputs that are zero: prune in blocks of 1x4. The state_dict
            gives the weights as they were rounded.

    Returns:
        The model, in eval mode, without what wraps it.

    Raises:
        CAPError: there is no such backend or it cannot run here, the model has no sparse Linear layer for it, cannot be
            used as it is (see `cap_hf.models.usable`), or fails on the example.
    """
    if backend not in BACKENDS:
        raise CAPError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    if dtype not in DTYPES:
        raise CAPError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if dtype == "int8" and backend not in ("auto", "kernel"):
        raise CAPError(f"backend {backend!r} knows no int8: take 'auto' or 'kernel'")
    model = usable(model)
    if example_inputs is not None:
        check_example(example_inputs, model)
    model.eval()
    linears = find_sparse_linears(model)
    if not linears:
        raise CAPError(f"{type(model).__name__} has no Linear layer with zeros: prune it first")
    devices = {stored_weight(linear).device.type for linear in linears.values()}
    if backend == "semi_structured" or (backend == "auto" and dtype == "float32" and devices == {"cuda"}):
        chosen = find_semi_structured(linears)
        if backend == "auto":
            example = (
                example_inputs if example_inputs is not None else make_example(model, 1, image_processor, image_size)
            )
            chosen = faster_layers(model, chosen, is_semi_structured_faster, example)
        for linear in chosen.values():
            to_semi_structured(linear)
        return model
    if devices != {"cpu"}:
        raise CAPError(f"the sparse layers run on the CPU and the model is on {', '.join(sorted(devices))}: move it")
    linears = {name: linear for name, linear in linears.items() if dtype_of(linear) == torch.float32}
    if not linears:
        raise CAPError("the sparse layers compute in float32: load the model with dtype='float32'")
    kind = choose_kind(backend) if dtype == "float32" else int8_kind()
    if dtype == "int8":
        weights = {name: stored_weight(linear) for name, linear in linears.items()}
        linears = {name: linears[name] for name, each in weights.items() if is_pruned(each) and is_quantizable(each)}
        if not linears:
            raise CAPError("no weight can be int8: none has 1 % zeros, is finite, and has rows that are short enough")
    kinds: dict[str, Kind] = dict.fromkeys(linears, kind)
    if backend == "auto":
        example = example_inputs if example_inputs is not None else make_example(model, 1, image_processor, image_size)
        if dtype == "int8":
            kinds = fastest_layers(model, linears, example)
        else:
            kinds = dict.fromkeys(faster_layers(model, linears, functools.partial(is_faster, kind), example), kind)
    gelus = find_gelus(model, kinds, example) if backend == "auto" else {}
    mlps = find_mlps(model, gelus, kinds, example) if gelus and dtype == "int8" else {}
    for name, chosen_kind in kinds.items():
        replace(model, name, chosen_kind(linears[name]))
    for name, module in list(model.named_modules()):
        if isinstance(module, StoredInt8Linear):
            replace(model, name, module.to_linear())
    fuse_gelus(model, gelus)
    fuse_mlps(model, mlps)
    if backend == "auto" and dtype == "int8" and kinds:
        speed_up_attention(model, example)
        fuse_blocks(model, example)
        speed_up_embeddings(model, example)
    return model


def fastest_layers(
    model: nn.Module, linears: Mapping[str, nn.Linear], example_inputs: Mapping[str, torch.Tensor]
) -> dict[str, Kind]:
    """Return the kind of layer that is the fastest, int8 ones among them, for those of some layers that it replaces.

    The arguments are those of `faster_layers`.
    """
    tokens = count_tokens(model, linears, example_inputs)
    kinds = {name: fastest_kind(linears[name], count) for name, count in tokens.items()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def faster_layers(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    is_faster: Callable[[nn.Linear, int], bool],
    example_inputs: Mapping[str, torch.Tensor],
) -> dict[str, nn.Linear]:
    """Return those of some layers that are faster once they are sparse.

    Args:
        model: whose layers they are.
        linears: by name.
        is_faster: asked with each layer and how many tokens it gets.
        example_inputs: what the model is called with.
    """
    tokens = count_tokens(model, linears, example_inputs)
    # A layer that the example does not reach is never slower for being left alone.
    return {name: linear for name, linear in linears.items() if name in tokens and is_faster(linear, tokens[name])}


def find_sparse_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linear layers that have zeros in their weight and can be replaced, by name.

    Left out: subclasses, which may compute something else; layers whose weight another module uses too; layers that
    accelerate moves between devices.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, StoredInt8Linear)
        and users.get(id(stored_weight(module)), 1) == 1
        and not hasattr(module, "_hf_hook")
        and int(torch.count_nonzero(stored_weight(module))) < stored_weight(module).numel()
    }


def choose_kind(backend: str) -> type[SparseWeightLinear]:
    """Return the kind of layer that a backend has on the CPU.

    Raises:
        CAPError: the kernel is asked for and cannot be compiled.
    """
    if backend == "csr":
        return CSRLinear
    if has_kernel():
        return SparseLinear
    if backend == "kernel":
        raise CAPError("backend='kernel' needs a C++ compiler; the warning above tells what failed")
    warn_without_kernel()
    return CSRLinear


def int8_kind() -> type[SparseWeightLinear]:
    """Return the sparse int8 layer.

    Raises:
        CAPError: its kernel cannot be compiled.
    """
    if are_disabled():
        raise CAPError(f"int8 needs the C++ kernels, which {DISABLE_VARIABLE} leaves out")
    if not has_int8_kernel():
        raise CAPError("dtype='int8' needs a C++ compiler; the warning above tells what failed")
    return SparseInt8Linear


@functools.cache
def warn_without_kernel() -> None:
    """Log, once per process, what runs in place of the kernel; another warning has said why it cannot be compiled."""
    logger.warning(
        "Without the C++ kernel, layers run on PyTorch's CSR product where that is faster, and dense elsewhere"
    )


def count_tokens(
    model: nn.Module, linears: Mapping[str, nn.Linear], example_inputs: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """Return how many rows of input each layer gets in one forward pass; the most, if it is called several times."""
    tokens: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            # Of the output, as the input may have come by its name.
            tokens[name] = max(tokens.get(name, 0), output.numel() // output.shape[-1])

        return hook

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        with uncompiled(model), torch.inference_mode():
            see(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def replace(model: nn.Module, name: str, new: nn.Linear | SparseWeightLinear) -> None:
    """Put a layer in the place of a Linear, with its hooks."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    carry_hooks(getattr(owner, child), new)
    setattr(owner, child, new)
