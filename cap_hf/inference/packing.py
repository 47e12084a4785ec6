"""A sparse weight in the form that the CPU kernel reads (described in kernels/csrc/sparse_linear.h), and back."""

import math
from dataclasses import dataclass

import torch

SLICE = 4  # rows that the kernel takes at a time
ROW_BLOCK = 128  # rows in a block, at most
# Columns in a block, at most. Of 192 columns 32 tokens fit the L1 cache; but a block must hold enough weights of a row
# to be worth its start, so that the second limit holds where a larger share than the third number is 0.
COL_BLOCK, WIDE_COL_BLOCK, WIDE_SPARSITY = 192, 384, 0.85
OFFSET = 16  # 8 bytes are the unit of offsets; a column of 32 float32 tokens has 16 of them


@dataclass(frozen=True)
class PackedWeight:
    """What is not zero of a weight `(rows, cols)`, in steps of four rows.

    Attributes:
        values: float32 `(steps, 4)`; 0 where a row has run out of weights.
        offsets: int16 `(steps, 4)`, read as unsigned: column in its block, times 16.
        starts: int32 `(segments + 1,)`: the first step of each segment (row block, column block, slice).
        order: int16 `(segments, 4)`: the four rows of a segment, counted in their row block.
        rows, cols: the dense shape.
        row_block, col_block: the size of a block; the last ones may be cut off by the shape.
    """

    values: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor
    rows: int
    cols: int
    row_block: int
    col_block: int


def even_blocks(size: int, limit: int, multiple: int) -> int:
    """The size of equal blocks of at most `limit`, rounded up to a multiple (of which `limit` is one)."""
    blocks = math.ceil(size / limit)
    return math.ceil(size / blocks / multiple) * multiple


def pack(weight: torch.Tensor) -> PackedWeight:
    """Pack a dense float weight `(rows, cols)`, neither of which is 0."""
    rows, cols = weight.shape
    # Whole squares of 16 are transposed fastest.
    row_block = even_blocks(rows, ROW_BLOCK, 16 if rows > 16 else SLICE)
    row, col = weight.nonzero(as_tuple=True)  # row by row, columns ascending
    sparse = 1 - len(row) / weight.numel() > WIDE_SPARSITY
    col_block = even_blocks(cols, WIDE_COL_BLOCK if sparse else COL_BLOCK, 1)
    row_blocks, col_blocks, slices = math.ceil(rows / row_block), math.ceil(cols / col_block), row_block // SLICE
    # Weights of each row in each column block; in every block the longest rows come first.
    run = row * col_blocks + col // col_block
    counts = torch.bincount(run, minlength=row_blocks * row_block * col_blocks)
    step = torch.arange(len(run)) - (counts.cumsum(0) - counts)[run]
    by_block = counts.view(row_blocks, row_block, col_blocks).transpose(1, 2).reshape(-1, row_block)
    order = by_block.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(row_block).expand_as(order))
    steps = by_block.gather(1, order)[:, ::SLICE].reshape(-1)
    starts = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    block = row // row_block * col_blocks + col // col_block
    place = rank[block, row % row_block]
    at = (starts[block * slices + place // SLICE] + step) * SLICE + place % SLICE
    values = torch.zeros(int(starts[-1]) * SLICE)
    values[at] = weight[row, col].float()
    offsets = torch.zeros(len(values), dtype=torch.int32)
    offsets[at] = (col % col_block * OFFSET).int()
    return PackedWeight(
        values.view(-1, SLICE),
        offsets.short().view(-1, SLICE),
        starts.int(),
        order.short().reshape(-1, SLICE).contiguous(),
        rows,
        cols,
        row_block,
        col_block,
    )


def unpack(packed: PackedWeight) -> torch.Tensor:
    """The dense float32 weight `(rows, cols)` that was packed."""
    col_blocks, slices = math.ceil(packed.cols / packed.col_block), packed.row_block // SLICE
    segment = torch.repeat_interleave(packed.starts.diff().long())
    block = segment // slices
    row = (block // col_blocks * packed.row_block)[:, None] + packed.order[segment].long()
    col = (block % col_blocks * packed.col_block)[:, None] + (packed.offsets.int() & 0xFFFF) // OFFSET
    stored = packed.values != 0
    dense = torch.zeros(packed.rows, packed.cols)
    dense[row[stored], col[stored]] = packed.values[stored]
    return dense
