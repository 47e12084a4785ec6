"""The second moment of a layer's inputs, `H = sum x x^T`: what SparseGPT takes for the Hessian of each row."""

from collections.abc import Iterator

import torch
from torch import nn

from cap_hf.method.gradients import unfold_parts
from cap_hf.targets import Target


def input_rows(
    target: Target, module: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Yield what the rows of a target's weight are multiplied with, some examples at a time.

    `H = sum x x^T` over these x is the Hessian of the squared error of the layer's output (SparseGPT, arXiv 2301.00774,
    section 3; OBC, arXiv 2208.11580, section 4), the same for all rows of a group.

    Args:
        target: a Linear or a Conv2d.
        module: the one of its modules that was called.
        inputs: what it was called with; Linear `(b, ..., in)`, Conv2d `(b, in, h, w)`.
        outputs: what it returned.

    Yields:
        `(groups, n, row)`, in the order of the target's blocks; a Linear has one group.
    """
    if not isinstance(module, nn.Conv2d):
        yield inputs.reshape(1, -1, inputs.shape[-1])
        return
    for _, patches in unfold_parts(module, inputs, outputs):
        yield patches.transpose(0, 1).flatten(1, 2)
