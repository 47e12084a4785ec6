"""The CPU kernels as operators of PyTorch, which `torch.compile` and `torch.export` know too."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from cap_hf.inference.int8_packing import PackedInt8Weight
from cap_hf.inference.packing import PackedWeight
from cap_hf.kernels.build import load_extension

# By what number the operators are told of an instruction set; csrc/sparse_operator.h says the same.
INSTRUCTION_SETS = ("", "portable", "avx2", "avx_vnni", "avx512", "avx512_vnni")


@functools.cache
def has_kernel() -> bool:
    """Return whether `torch.ops.cap_hf.sparse_linear` can be used; it is compiled if need be.

    A warning says once why it cannot be compiled.
    """
    if not load_extension("sparse_linear"):
        return False
    register("sparse_linear", fake_sparse_linear)
    return True


@functools.cache
def has_int8_kernel() -> bool:
    """Return whether `torch.ops.cap_hf.sparse_int8_linear` can be used, as `has_kernel`."""
    if not load_extension("sparse_int8_linear"):
        return False
    register("sparse_int8_linear", fake_sparse_int8_linear)
    register("sparse_int8_mlp", fake_sparse_int8_mlp)
    register("sparse_int8_attention_branch", fake_branch)
    register("sparse_int8_mlp_branch", fake_branch)
    register("sparse_int8_patches", fake_sparse_int8_patches)
    register("quantize_tokens", fake_quantize_tokens)
    register("int8_attention", fake_int8_attention)
    return True


def register(name: str, fake: Callable[..., Any]) -> None:
    """Tell PyTorch what an operator returns, and that it is for inference only.

    A backward pass is an error that names the operator, instead of gradients that lack a part. LibTorch's stable ABI,
    which the operators are written in, has no such registration.
    """

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"cap_hf::{name} is for inference only: it has no derivative")

    torch.library.register_fake(f"cap_hf::{name}", fake)
    torch.library.register_autograd(f"cap_hf::{name}", refuse)


def run(operator: Callable[..., Any], *args: Any) -> Any:
    """Return what an operator returns; without gradients past its autograd, which is Python's and takes 8 microseconds.

    The compiler sees the operator alone.

    Raises:
        RuntimeError: a derivative is asked for: forward-mode ones would be 0 without a word.
    """
    if torch.compiler.is_compiling():
        return operator(*args)
    transform = torch._C._functorch.peek_interpreter_stack()
    derives = transform is not None and transform.key() in (TransformType.Grad, TransformType.Jvp)
    if derives or (forward_ad._current_level >= 0 and any(map(has_tangent, args))):
        raise RuntimeError(f"{operator} is for inference only: it has no derivative")
    if torch.is_grad_enabled() or transform is not None:
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def number_of(instruction_set: str) -> int:
    """Return the number of an instruction set.

    Raises:
        RuntimeError: there is none of this name.
    """
    if instruction_set not in INSTRUCTION_SETS:
        raise RuntimeError(
            f"there is no instruction set {instruction_set}: {', '.join(INSTRUCTION_SETS[1:])} are known"
        )
    return INSTRUCTION_SETS.index(instruction_set)


def has_tangent(argument: Any) -> bool:
    """Return whether an argument is a tensor whose forward-mode derivative is computed along, or a list with one."""
    if isinstance(argument, list):
        return any(map(has_tangent, argument))
    return isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def fake_sparse_linear(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an empty output of the operator: `x (..., cols)` -> `(..., rows)`, in x's dtype."""
    rows = args[5]
    return x.new_empty((*x.shape[:-1], rows))


def fake_sparse_int8_linear(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an empty output of the operator, as `fake_sparse_linear`."""
    rows = args[7]
    return x.new_empty((*x.shape[:-1], rows))


def fake_sparse_int8_mlp(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an empty output of the operator, as `fake_sparse_linear`."""
    rows = args[18]
    return x.new_empty((*x.shape[:-1], rows))


def fake_sparse_int8_patches(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an empty output of the operator: `(images, channels, height, width)` -> `(images, patches, rows)`."""
    rows, (height, width) = args[7], args[11:13]
    return x.new_empty((x.shape[0], (x.shape[2] // height) * (x.shape[3] // width), rows))


def fake_branch(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an empty output of an operator that computes a residual branch: as its input."""
    return torch.empty_like(x)


def fake_quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty outputs of the operator."""
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def fake_int8_attention(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an empty output of the operator: `(images, heads, queries, cols)` -> `(images, queries, heads, cols)`."""
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


def sparse_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    instruction_set: str = "",
    gelu: bool = False,
) -> torch.Tensor:
    """Return `x W^T + bias`, `(..., rows)` in x's dtype; the sums are float32.

    Args:
        x: `(..., cols)`, float32, float16 or bfloat16, on the CPU.
        weight: W `(rows, cols)`, packed.
        bias: `(rows,)`.
        instruction_set: 'avx512', 'avx2' or 'portable'; '' takes what the environment variable CAP_HF_INSTRUCTION_SET
            names, or else the best that the processor has. Names of `sparse_int8_linear` are known too.
        gelu: return the GELU of it, by the error function.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
    """
    return run(
        torch.ops.cap_hf.sparse_linear,
        x,
        weight.values,
        weight.offsets,
        weight.starts,
        weight.order,
        bias,
        weight.rows,
        weight.cols,
        weight.row_block,
        weight.col_block,
        number_of(instruction_set),
        gelu,
    )


def sparse_int8_linear(
    x: torch.Tensor,
    weight: PackedInt8Weight,
    bias: torch.Tensor | None = None,
    instruction_set: str = "",
    gelu: bool = False,
) -> torch.Tensor:
    """Return `x W^T + bias`, `(..., rows)` in x's dtype, for int8 W and x quantised to int8 on its way.

    Each token has its own scale s = max |x| / 127, and `q = x * (127 / max |x|)` rounded to the nearest whole number,
    halves to the even one. The sums of products are exact, and y = (sum * row's scale) * s + bias, each operation
    rounded to float32. Every instruction set gives the same bits. A token of zeros (or nothing above 2^-120) has scale
    0; one with a NaN or an infinity gets outputs that are all NaN.

    Args:
        x: `(..., cols)`, float32, float16 or bfloat16, on the CPU.
        weight: W `(rows, cols)`, quantised and packed.
        bias: `(rows,)`.
        instruction_set: 'avx512_vnni', 'avx_vnni', 'avx2' or 'portable'; '' takes what the environment variable
            CAP_HF_INSTRUCTION_SET names, or else the best that the processor has. 'avx512' means 'avx2' here.
        gelu: return the GELU of it, by the error function.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
    """
    return run(torch.ops.cap_hf.sparse_int8_linear, x, *int8_arguments(weight, bias), number_of(instruction_set), gelu)


def sparse_int8_mlp(
    x: torch.Tensor,
    first: PackedInt8Weight,
    first_bias: torch.Tensor | None,
    second: PackedInt8Weight,
    second_bias: torch.Tensor | None = None,
    instruction_set: str = "",
) -> torch.Tensor:
    """Return the second layer of the GELU of the first, as two calls of `sparse_int8_linear` do, with the same bits.

    What is between the layers is in float32 and does not leave the processor's caches. Two calls round it to half
    precision where x has that.

    Args:
        x: `(..., cols)`, float32, float16 or bfloat16, on the CPU.
        first: `(hidden, cols)`, quantised and packed.
        first_bias: `(hidden,)`.
        second: `(rows, hidden)`, quantised and packed.
        second_bias: `(rows,)`.
        instruction_set: as of `sparse_int8_linear`.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
    """
    layers = (*int8_arguments(first, first_bias), *int8_arguments(second, second_bias))
    return run(torch.ops.cap_hf.sparse_int8_mlp, x, *layers, number_of(instruction_set))


def int8_arguments(weight: PackedInt8Weight, bias: torch.Tensor | None) -> tuple[Any, ...]:
    """Return what the operators are told of a layer, in their order."""
    return (
        weight.values,
        weight.offsets,
        weight.starts,
        weight.order,
        weight.scales,
        weight.corrections,
        bias,
        weight.rows,
        weight.cols,
        weight.row_block,
        weight.col_block,
    )


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x `(..., cols)` quantised as `sparse_int8_linear` does it: uint8, 128 added, and scales `(..., 1)`.

    Raises:
        RuntimeError: x has no columns, or is not float32, float16 or bfloat16 on the CPU.
    """
    return run(torch.ops.cap_hf.quantize_tokens, x)


def int8_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, instruction_set: str = ""
) -> torch.Tensor:
    """Return `softmax(scale q k^T) v` with products in int8: `(images, queries, heads, cols)` in q's dtype.

    q and k are quantised per token, as the inputs of `sparse_int8_linear`, k without its mean over the tokens, which
    changes no weight (SageAttention, arXiv 2410.02367, section 4.2); v per channel. The weights of the softmax have 16
    bits, of a query's largest. Every instruction set gives the same bits. A number that is not finite makes all that
    it enters NaN.

    Args:
        q: `(images, heads, queries, cols)`, float32, float16 or bfloat16, on the CPU.
        k, v: `(images, heads, keys, cols)`, at most 32,768 keys.
        scale: positive.
        instruction_set: as of `sparse_int8_linear`.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
    """
    return run(torch.ops.cap_hf.int8_attention, q, k, v, scale, number_of(instruction_set))
