"""The second moments of a layer's inputs, `sum x x^T`: SparseGPT's Hessian of each row, and what the prior is made of.

Of a layer only what blocks see of it is summed: where a block is a part of a row, the diagonal blocks.
"""

from collections.abc import Iterator

import torch
from torch import nn

from cap_hf.method.gradients import unfold_parts
from cap_hf.targets import Target


def moment_size(target: Target) -> int:
    """Return the side of a moment: the weights of a block, or of a row where a block is several rows."""
    return min(target.block_size, target.row_size)


def num_moments(target: Target) -> int:
    """Return how many moments a target has: as many as blocks fit into a row, and that for every group."""
    return getattr(target.module, "groups", 1) * target.row_size // moment_size(target)


def moments_of(target: Target, blocks: torch.Tensor) -> torch.Tensor:
    """Return which moments the weights of some blocks are multiplied with.

    Args:
        target: whose blocks they are.
        blocks: `(n,)` their numbers in the target.

    Returns:
        `(n, k)`, for each of the k rows in a block; k is 1 where a block is no more than a row.
    """
    size = moment_size(target)
    per_row, per_block = target.row_size // size, target.block_size // size
    parts = blocks[:, None] * per_block + torch.arange(per_block, device=blocks.device)
    group = parts // per_row * num_moments(target) // (len(target.weight) * per_row)
    return group * per_row + parts % per_row


def input_rows(
    target: Target, module: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield what the weights of a target are multiplied with, some examples at a time.

    `H = sum x x^T` over whole rows x is the Hessian of the squared error of the layer's output (SparseGPT, arXiv
    2301.00774, section 3; OBC, arXiv 2208.11580, section 4), the same for all rows of a group.

    Args:
        target: a Linear or a Conv2d.
        module: the one of its modules that was called.
        inputs: what it was called with; Linear `(b, ..., in)`, Conv2d `(b, in, h, w)`.
        outputs: what it returned.

    Yields:
        `(moments, n, size)`, in the order of the target's blocks.
    """
    size = moment_size(target)
    if not isinstance(module, nn.Conv2d):
        yield inputs.reshape(-1, inputs.shape[-1] // size, size).transpose(0, 1)
        return
    for _, patches in unfold_parts(module, inputs, outputs):
        yield patches.unflatten(3, (-1, size)).permute(1, 3, 0, 2, 4).flatten(2, 3).flatten(0, 1)
