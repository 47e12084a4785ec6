"""The CPU kernel as an operator of PyTorch, which `torch.compile` and `torch.export` know too."""

import functools
from typing import Any

import torch

from cap_hf.inference.packing import PackedWeight
from cap_hf.kernels.build import load_extension


@functools.cache
def has_kernel() -> bool:
    """Return whether `torch.ops.cap_hf.sparse_linear` can be used; it is compiled if need be.

    A warning says once why it cannot be compiled.
    """
    if not load_extension("sparse_linear"):
        return False
    torch.library.register_fake("cap_hf::sparse_linear", fake_sparse_linear)
    return True


def fake_sparse_linear(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return an empty output of the operator: `x (..., cols)` -> `(..., rows)`, in x's dtype."""
    rows = args[5]
    return x.new_empty((*x.shape[:-1], rows))


def sparse_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, instruction_set: str = ""
) -> torch.Tensor:
    """Return `x W^T + bias`, `(..., rows)` in x's dtype; the sums are float32.

    Args:
        x: `(..., cols)`, float32, float16 or bfloat16, on the CPU.
        weight: W `(rows, cols)`, packed.
        bias: `(rows,)`.
        instruction_set: 'avx512', 'avx2' or 'portable'; '' takes the best that the processor has.

    Raises:
        RuntimeError: shapes or dtypes do not fit each other, or the processor lacks the instruction set.
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
