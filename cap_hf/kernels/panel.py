"""The steps of a panel of the elimination as one kernel: a GPU launches it once where PyTorch launches 22 a step.

Needs Triton, which PyTorch brings for CUDA. `cap_hf.method.steps` has the same in PyTorch, and for units of several
weights, which this has not; `cap_hf.method.panels` chooses, and checks.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl


@triton.jit
def remove_kernel(
    matrices,
    weights,
    diagonal,
    zero,
    position,
    given,
    columns,
    pivots,
    costs,
    removed,
    width,
    count,
    groups,
    group,
    limit,
    WIDE: tl.constexpr,
    GROUPED: tl.constexpr,
) -> None:
    """Do what `cap_hf.method.steps.remove_in_torch` does, one program a block.

    WIDE is a power of two of at least `width`; GROUPED says whether there is an N:M pattern.
    """
    block = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDE)
    inside = at < width
    row = block * width + at
    w = tl.load(weights + row, mask=inside, other=0.0)
    d = tl.load(diagonal + row, mask=inside, other=1.0)
    first = tl.load(zero + row, mask=inside, other=0) != 0
    gone = at >= width
    if GROUPED:
        member = block * groups + tl.load(position + row, mask=inside, other=0) // group
    for k in range(count):
        scores = tl.where(first, -1.0, w * w / tl.where(gone, 1.0, d))
        # What is not a number goes first, as in PyTorch, and its pivot is lost: `argmin` would pass over it, and take
        # what is no weight of the block if there is nothing else.
        scores = tl.where(scores == scores, scores, float("-inf"))
        scores = tl.where(gone, float("inf"), scores)
        if GROUPED:
            scores = tl.where(tl.load(given + member, mask=inside, other=0) == limit, float("inf"), scores)
        pivot = tl.argmin(scores, 0)
        chosen = at == pivot
        root = tl.sqrt(tl.sum(tl.where(chosen, d, 0.0), 0))
        column = tl.load(matrices + (block * width + pivot) * width + at, mask=inside, other=0.0)
        for earlier in range(k):
            past = columns + (block * count + earlier) * width
            column -= tl.load(past + pivot) * tl.load(past + at, mask=inside, other=0.0)
        column /= root
        tl.store(columns + (block * count + k) * width + at, column, mask=inside)
        cost = tl.sum(tl.where(chosen, w, 0.0), 0) / root
        w = tl.where(chosen, 0.0, w - cost * column)
        d -= column * column
        gone = gone | chosen
        tl.store(pivots + block * count + k, pivot.to(tl.int64))
        tl.store(costs + block * count + k, cost)
        if GROUPED:
            full = block * groups + tl.load(position + block * width + pivot) // group
            tl.store(given + full, tl.load(given + full) + 1)
        # What one thread has stored, others load in the next step.
        tl.debug_barrier()
    tl.store(weights + row, w, mask=inside)
    tl.store(removed + row, gone & inside, mask=inside)


def remove(
    matrices: torch.Tensor,
    weights: torch.Tensor,
    diagonal: torch.Tensor,
    zero: torch.Tensor,
    position: torch.Tensor,
    given: torch.Tensor,
    columns: torch.Tensor,
    pivots: torch.Tensor,
    costs: torch.Tensor,
    removed: torch.Tensor,
    group: int,
    limit: int,
) -> None:
    """Do what `cap_hf.method.steps.remove_in_torch` does; all tensors contiguous."""
    n, count, width = columns.shape
    wide = triton.next_power_of_2(width)
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(matrices.device) if matrices.is_cuda else nullcontext():
        remove_kernel[(n,)](
            matrices,
            weights,
            diagonal,
            zero,
            position,
            given,
            columns,
            pivots,
            costs,
            removed,
            width,
            count,
            given.shape[1],
            max(group, 1),
            limit,
            WIDE=wide,
            GROUPED=group > 0,
            # A warp for every 256 entries: up to 4,096 of them a thread holds all that is its own in registers.
            num_warps=min(16, max(1, wide // 256)),
        )
