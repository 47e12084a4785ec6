"""The residual branches of a transformer's block as operators: x + factors * f(LayerNorm(x)), in one call each."""

from dataclasses import dataclass

import torch

from cap_hf.inference.int8_packing import PackedInt8Weight
from cap_hf.inference.operators import number_of, run

# A layer as the branches take it: its packed weight, and its bias `(rows,)` if there is one.
Layer = tuple[PackedInt8Weight, torch.Tensor | None]


@dataclass(frozen=True)
class Norm:
    """A LayerNorm over all columns of a token.

    Attributes:
        weight, bias: float32 `(cols,)`.
        epsilon: what is added to the variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    epsilon: float


def sparse_int8_attention_branch(
    x: torch.Tensor,
    norm: Norm,
    query: Layer,
    key: Layer,
    value: Layer,
    heads: int,
    scale: float,
    output: Layer,
    factors: torch.Tensor | None = None,
    instruction_set: str = "",
) -> torch.Tensor:
    """Return `x + factors * output(attention)`, where attention has the query, key and value of `norm(x)`.

    The layers are those of `sparse_int8_linear` and attention is `int8_attention`, with the same bits. The sums of
    `norm` go in another order than PyTorch's, the same one for every instruction set: its last bits differ.

    Args:
        x: float32 `(images, tokens, cols)`, without gaps, on the CPU.
        norm: of `cols` columns.
        query, key, value: `(heads * size, cols)`.
        heads: of attention.
        scale: what scores are multiplied by; positive.
        output: `(cols, heads * size)`.
        factors: `(cols,)`, LayerScale (arXiv 2103.17239).
        instruction_set: as of `sparse_int8_linear`.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
    """
    return run(
        torch.ops.cap_hf.sparse_int8_attention_branch,
        x,
        norm.weight,
        norm.bias,
        norm.epsilon,
        *listed(query),
        *listed(key),
        *listed(value),
        heads,
        scale,
        *listed(output),
        factors,
        number_of(instruction_set),
    )


def sparse_int8_mlp_branch(
    x: torch.Tensor,
    norm: Norm,
    first: Layer,
    second: Layer,
    factors: torch.Tensor | None = None,
    instruction_set: str = "",
) -> torch.Tensor:
    """Return `x + factors * second(gelu(first(norm(x))))`; the layers are those of `sparse_int8_mlp`, bit for bit.

    Args:
        x, norm, factors, instruction_set: as of `sparse_int8_attention_branch`.
        first: `(hidden, cols)`.
        second: `(cols, hidden)`.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
    """
    return run(
        torch.ops.cap_hf.sparse_int8_mlp_branch,
        x,
        norm.weight,
        norm.bias,
        norm.epsilon,
        *listed(first),
        *listed(second),
        factors,
        number_of(instruction_set),
    )


def listed(layer: Layer) -> tuple[list[torch.Tensor], list[int]]:
    """Return the tensors and the sizes that the operators are told of a layer."""
    weight, bias = layer
    tensors = [weight.values, weight.offsets, weight.starts, weight.order, weight.scales, weight.corrections]
    if bias is not None:
        tensors.append(bias)
    return tensors, [weight.rows, weight.cols, weight.row_block, weight.col_block]
