"""Quantise a sparse weight to int8 and pack it into the form that the sparse int8 kernel reads, and back.

A word is four int8 of consecutive columns of a row (a row's last one is filled up with 0). A word is stored if any of
its numbers is not 0: weights pruned in blocks of 1x4 are stored without a single 0.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from cap_hf.checkpoints.int8 import MOST_COLS, quantize_rows
from cap_hf.inference.packing import SLICE, lay_out, places

WORD = 4  # int8 numbers in a word


@dataclass(frozen=True)
class PackedInt8Weight:
    """The words of an int8 weight `(rows, cols)` that are not 0, in steps of four rows.

    Attributes:
        values: int8 `(steps, 4, 4)`: four words; 0 where a row has no more of them in its segment.
        offsets: int16 `(steps, 4)`, read as unsigned: the word, counted in its column block, times 16.
        starts: int32 `(segments + 1,)`: the first step of each segment, and the number of all steps.
        order: int16 `(segments, 4)`: the four rows of each segment, counted in their row block.
        scales: float32 `(rows,)`: a weight is its int8 number times its row's scale.
        corrections: int32 `(rows,)`: -128 times the sum of the row, because the kernel's inputs are stored plus 128.
        rows, cols: the dense shape.
        row_block, col_block: rows of a row block and words of a column block; the last ones may have fewer.
    """

    values: torch.Tensor
    offsets: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor
    scales: torch.Tensor
    corrections: torch.Tensor
    rows: int
    cols: int
    row_block: int
    col_block: int


def is_quantizable(weight: torch.Tensor) -> bool:
    """Return whether a weight `(rows, cols)` can be int8: it is finite, and no row is too long for 32-bit sums."""
    return weight.shape[1] <= MOST_COLS and bool(weight.isfinite().all())


def pack_int8(weight: torch.Tensor) -> PackedInt8Weight:
    """Return a dense, finite float weight `(rows, cols)` quantised and packed; neither dimension is 0."""
    return pack_rows(*quantize_rows(weight))


def pack_rows(quantized: torch.Tensor, scales: torch.Tensor) -> PackedInt8Weight:
    """Return an int8 weight packed, as `quantize_rows` gives it.

    Args:
        quantized: `(rows, cols)`, -127 to 127; neither dimension is 0.
        scales: float32 `(rows,)`.
    """
    rows, cols = quantized.shape
    words = functional.pad(quantized, (0, -cols % WORD)).view(rows, -1, WORD)
    layout = lay_out((words != 0).any(dim=2))
    values = torch.zeros(layout.offsets.numel(), WORD, dtype=torch.int8)
    values[layout.at] = words[layout.row, layout.word]
    return PackedInt8Weight(
        values.view(-1, SLICE, WORD),
        layout.offsets,
        layout.starts,
        layout.order,
        scales,
        -128 * quantized.sum(dim=1, dtype=torch.int32),
        rows,
        cols,
        layout.row_block,
        layout.col_block,
    )


def unpack_int8(packed: PackedInt8Weight) -> torch.Tensor:
    """Return the dense int8 weight `(rows, cols)` that was packed."""
    words = math.ceil(packed.cols / WORD)
    row, word = places(packed.offsets, packed.starts, packed.order, packed.row_block, packed.col_block, words)
    stored = (packed.values != 0).any(dim=2)
    dense = torch.zeros(packed.rows, words, WORD, dtype=torch.int8)
    dense[row[stored], word[stored]] = packed.values[stored]
    return dense.view(packed.rows, -1)[:, : packed.cols]
