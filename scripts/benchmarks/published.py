"""The procedure as published (arXiv 2210.09223 and the code of its authors), written plainly: what is compared with.

The inverse Fisher of every block is kept and updated by rank one with every gradient (Woodbury; the same as in
oBERT). The elimination forms the outer product of the pivot's column at every step, subtracts it from the whole
inverse, and keeps a copy of the weights after each. All of it in float32.
"""

from dataclasses import dataclass

import torch


class WoodburyFisher:
    """The inverses of `damp I + (1/N) sum g g^T`, one B x B matrix per block.

    Args:
        num_blocks, block_size: blocks and B.
        num_grads: N, known beforehand.
        damp: absolute.
    """

    def __init__(self, num_blocks: int, block_size: int, num_grads: int, damp: float) -> None:
        self.num_grads = num_grads
        self.inverse = (torch.eye(block_size) / damp).repeat(num_blocks, 1, 1)

    def add(self, gradient: torch.Tensor) -> None:
        """Take one gradient `(num_blocks, B)` into all inverses (Sherman and Morrison)."""
        product = torch.bmm(self.inverse, gradient[..., None])[..., 0]
        scale = (self.num_grads + (gradient * product).sum(dim=1)).sqrt_()
        product = product / scale[:, None]
        self.inverse.baddbmm_(product[..., None], product[:, None], alpha=-1)


@dataclass
class Traces:
    """What the published elimination keeps of `(n, B)` weights.

    Attributes:
        weights: `(B + 1, n, B)`: the weights after every number of removals.
        losses: `(n, B)`: the loss of every removal.
        order: `(n, B)`: which weight each removal took.
    """

    weights: torch.Tensor
    losses: torch.Tensor
    order: torch.Tensor


def eliminate(weights: torch.Tensor, inverse: torch.Tensor, steps: int | None = None) -> Traces:
    """Remove the cheapest weight and update everything, `steps` times (default: until none is left).

    Args:
        weights: `(n, B)`.
        inverse: `(n, B, B)`; updated in place.
    """
    count, size = weights.shape
    steps = size if steps is None else steps
    block = torch.arange(count)
    traces = torch.empty(steps + 1, count, size)
    losses, order = torch.empty(count, steps), torch.empty(count, steps, dtype=torch.int64)
    removed = torch.zeros(count, size, dtype=torch.bool)
    # Taken once, as an allocator that caches would: fresh memory at every step makes it several times slower.
    outer = torch.empty_like(inverse)
    traces[0] = weights
    for step in range(steps):
        w = traces[step].clone()
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        scores = (w.square() / diagonal / 2).masked_fill_(removed, torch.inf)
        losses[:, step], pivot = scores.min(dim=1)
        column, at_pivot = inverse[block, pivot], diagonal[block, pivot]
        w -= column * (w[block, pivot] / at_pivot)[:, None]
        removed[block, pivot] = True
        traces[step + 1] = w.masked_fill_(removed, 0.0)
        order[:, step] = pivot
        column = column / at_pivot.sqrt()[:, None]
        inverse -= torch.bmm(column[:, :, None], column[:, None], out=outer)
    return Traces(traces, losses, order)
