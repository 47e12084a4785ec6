"""Pack a sparse weight into the form that the CPU kernel reads, and back.

The words row block, column block, slice, step, segment and offset are explained in kernels/csrc/sparse_linear.h.
"""

import math
from dataclasses import dataclass

import torch

SLICE = 4  # rows of a slice
ROW_BLOCK = 128  # rows of a row block, at most
# Columns of a column block, at most. 32 tokens of 192 columns fit into the L1 cache. But a segment needs enough steps
# to be worth its start, so that the blocks are twice as wide where more than WIDE_SPARSITY of the weights are 0.
COL_BLOCK, WIDE_COL_BLOCK, WIDE_SPARSITY = 192, 384, 0.85
OFFSET = 16  # offset of one column: 32 float32 tokens, counted in units of 8 bytes


@dataclass(frozen=True)
class PackedWeight:
    """The non-zero entries of a weight `(rows, cols)`, in steps of four rows.

    Attributes:
        values: float32 `(steps, 4)`; 0 where a row has no more weights in its segment.
        offsets: int16 `(steps, 4)`, read as unsigned: the column, counted in its column block, times 16.
        starts: int32 `(segments + 1,)`: the first step of each segment, and the number of all steps.
        order: int16 `(segments, 4)`: the four rows of each segment, counted in their row block.
        rows, cols: the dense shape.
        row_block, col_block: rows of a row block and columns of a column block; the last ones may have fewer.
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
    """Return the size of the fewest blocks, all alike, that hold `size`: a multiple of `multiple`, at most `limit`.

    `limit` is a multiple of `multiple`.
    """
    blocks = math.ceil(size / limit)
    return math.ceil(size / blocks / multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where the stored words of a weight `(rows, words)` lie: a word is a float, or four int8 of consecutive columns.

    Attributes:
        row, word: `(n,)` each: the row and the word of every stored one, row after row.
        at: `(n,)`: its place in the packed words `(steps * 4,)`.
        offsets, starts, order, row_block, col_block: as of a `PackedWeight`, in words instead of columns.
    """

    row: torch.Tensor
    word: torch.Tensor
    at: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor
    row_block: int
    col_block: int


def lay_out(stored: torch.Tensor) -> Layout:
    """Return the layout of those words of a weight that a mask `(rows, words)` says are stored; no size is 0."""
    rows, cols = stored.shape
    # Transposing is fastest in whole squares of 16.
    row_block = even_blocks(rows, ROW_BLOCK, 16 if rows > 16 else SLICE)
    row, col = stored.nonzero(as_tuple=True)  # row after row, columns ascending
    sparse = 1 - len(row) / stored.numel() > WIDE_SPARSITY
    col_block = even_blocks(cols, WIDE_COL_BLOCK if sparse else COL_BLOCK, 1)
    row_blocks, col_blocks, slices = math.ceil(rows / row_block), math.ceil(cols / col_block), row_block // SLICE
    # How many words each row has in each column block. In every block the rows with the most come first.
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
    offsets = torch.zeros(int(starts[-1]) * SLICE, dtype=torch.int32)
    offsets[at] = (col % col_block * OFFSET).int()
    return Layout(
        row,
        col,
        at,
        offsets.short().view(-1, SLICE),
        starts.int(),
        order.short().reshape(-1, SLICE).contiguous(),
        row_block,
        col_block,
    )


def pack(weight: torch.Tensor) -> PackedWeight:
    """Return a dense float weight `(rows, cols)` in packed form; neither dimension is 0."""
    layout = lay_out(weight != 0)
    values = torch.zeros(layout.offsets.numel())
    values[layout.at] = weight[layout.row, layout.word].float()
    rows, cols = weight.shape
    return PackedWeight(
        values.view(-1, SLICE),
        layout.offsets,
        layout.starts,
        layout.order,
        rows,
        cols,
        layout.row_block,
        layout.col_block,
    )


def places(
    offsets: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, row_block: int, col_block: int, words: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row and the word, each `(steps, 4)`, of every packed word of a weight whose rows have `words` words.

    The other arguments are those of a `Layout`. Places that fill up a step name a row and a word all the same.
    """
    col_blocks, slices = math.ceil(words / col_block), row_block // SLICE
    segment = torch.repeat_interleave(starts.diff().long())
    block = segment // slices
    row = (block // col_blocks * row_block)[:, None] + order[segment].long()
    word = (block % col_blocks * col_block)[:, None] + (offsets.int() & 0xFFFF) // OFFSET
    return row, word


def unpack(packed: PackedWeight) -> torch.Tensor:
    """Return the dense float32 weight `(rows, cols)` that was packed."""
    row, col = places(packed.offsets, packed.starts, packed.order, packed.row_block, packed.col_block, packed.cols)
    stored = packed.values != 0
    dense = torch.zeros(packed.rows, packed.cols)
    dense[row[stored], col[stored]] = packed.values[stored]
    return dense
