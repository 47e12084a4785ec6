"""The CPU kernel as an operator that PyTorch's compiler and exporter know."""

import functools

import torch

from cap_hf.inference.packing import PackedWeight
from cap_hf.kernels.build import load_extension


@functools.cache
def has_kernel() -> bool:
    """Whether `torch.ops.cap_hf.sparse_linear` is there; compiles it if need be, and warns once where it cannot."""
    if not load_extension("sparse_linear"):
        return False
    torch.library.register_fake("cap_hf::sparse_linear", fake_sparse_linear)
    return True


def fake_sparse_linear(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """The output's shape and dtype: `(..., cols)` -> `(..., rows)`."""
    rows = args[5]
    return x.new_empty((*x.shape[:-1], rows))


def sparse_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, instruction_set: str = ""
) -> torch.Tensor:
    """`x W^T + bias` in float32: `(..., cols)` -> `(..., rows)`, in x's dtype.

    Args:
        instruction_set: 'avx512', 'avx2' or 'portable'; default: the best that the processor has.

    Raises:
        RuntimeError: shapes or dtypes do not fit, or the processor lacks the instruction set.
    """
    return torch.ops.cap_hf.sparse_linear(
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
        instruction_set,
    )
