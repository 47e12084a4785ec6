"""The int8 form of a compressed weight: rounded, with a scale per row, and without its zeros.

A weight `X` of shape `(rows, cols)` is int8 times a float32 scale per row. Each row is cut into blocks of 1, 2, 4 or 8
numbers, its last one filled up with 0, and every block is read as one integer of as many bytes. These are packed as any
tensor is (`compression.py`), so that a block costs one bit where it is 0 as a whole; the size that takes fewest bytes
is stored. Beside the packed integers `(rows, ceil(cols / size))`, whose dtype tells the size, lie

- `X.cap_shape`: `(0, rows, cols)`, in the dtype that the weight had before it was rounded;
- `X.cap_scales`: int32 `(rows,)`, the bits of float32. As floats, transformers would cast them to the model's dtype.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

from cap_hf.checkpoints.compression import INTEGERS, SCALES, SHAPE, VALUES, check_parts, pack, unpack
from cap_hf.errors import CAPError
from cap_hf.memory import zeros

LARGEST = 127  # of an int8 number: -128 is left out, so that every number has its negative
# Columns of a row, at most: partial sums of more products of an input, up to 255 - 127, and 127 may not fit 32 bits.
MOST_COLS = (2**31 - 1) // (128 * LARGEST)
# A weight with a smaller share of zeros has not been pruned and stays as it is: heads and embeddings, to which accuracy
# is most sensitive. Pruned to 15 % a layer gains too, as dense int8 is faster and smaller than dense floats.
LEAST_PRUNED = 0.01
# A scale, at most: 127 times it is finite.
LARGEST_SCALE = 2.679388e36
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a finite weight `(rows, cols)` as int8, -127 to 127, and one float32 scale per row `(rows,)`.

    The scale is the row's largest magnitude / 127, or 0 for a row of zeros; numbers are rounded to the nearest, halves
    to the even one. Zeros stay 0.
    """
    # In float64 the product is exact and the quotient rounds to no half that it is not; nothing overflows.
    largest = weight.abs().amax(dim=1).double()
    quantized = (weight.double() * LARGEST / largest.where(largest > 0, 1)[:, None]).round()
    return quantized.to(torch.int8), (largest / LARGEST).clamp(max=LARGEST_SCALE).float()


def dequantize_rows(quantized: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return what int8 numbers `(rows, cols)` with a scale per row `(rows,)` stand for, in float32."""
    dense = zeros(quantized.shape, torch.float32, quantized.device)
    return torch.mul(quantized, scales[:, None], out=dense)


def is_for_int8(weight: torch.Tensor) -> bool:
    """Return whether the weight of a Linear is stored in int8: it is sparse, in floats, and no row is too long."""
    if weight.dim() != 2 or weight.dtype not in FLOATS or not weight.numel() or weight.shape[1] > MOST_COLS:
        return False
    return is_pruned(weight)


def is_pruned(weight: torch.Tensor) -> bool:
    """Return whether a weight has so many zeros that it has been pruned."""
    return int(torch.count_nonzero(weight)) <= (1 - LEAST_PRUNED) * weight.numel()


def pack_int8(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor] | None:
    """Return the parts of a weight `(rows, cols)`, rounded to int8, by their suffix; None if dense int8 is smaller.

    Args:
        weight: on the CPU, floats.
        name: of it, for the error.

    Raises:
        CAPError: an entry is not finite in float32.
    """
    floats = weight.detach().float()
    if not floats.isfinite().all():
        raise CAPError(f"{name} has entries that are NaN or infinite, which int8 cannot stand for")
    quantized, scales = quantize_rows(floats)
    best, least = None, 0
    for size, dtype in INTEGERS.items():
        parts = pack(functional.pad(quantized, (0, -quantized.shape[1] % size)).view(dtype))
        taken = sum(part.numel() * part.element_size() for part in parts.values()) if parts else 0
        # Only the smallest so far is kept in memory.
        if parts and (best is None or taken < least):
            best, least = parts, taken
    if best is None:
        return None
    shape = torch.empty((0, *weight.shape), dtype=weight.dtype)
    return best | {SHAPE: shape, SCALES: scales.view(torch.int32)}


def unpack_int8(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the int8 weight `(rows, cols)` and its float32 scales `(rows,)`, on the device of the parts.

    Args:
        parts: what `pack_int8` returned, its shape perhaps cast to another dtype of floats.

    Raises:
        CAPError: the parts contradict each other.
    """
    check_int8_parts(parts, "a packed tensor")
    quantized = unpack(_blocks(parts)).view(torch.int8)[:, : parts[SHAPE].shape[2]]
    return quantized.contiguous(), parts[SCALES].view(torch.float32)


def unpack_any(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the dense tensor of either form: of int8 what it stands for, in the dtype of its shape.

    Raises:
        CAPError: as `unpack` and `unpack_int8`.
    """
    if SCALES not in parts:
        return unpack(parts)
    return dequantize_rows(*unpack_int8(parts)).to(parts[SHAPE].dtype)


def check_int8_parts(parts: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise a CAPError if the parts of an int8 weight do not fit each other, or hold numbers that none has.

    Of parts on the meta device only shapes and dtypes are looked at.
    """
    # What may be lacking is said as of any packed tensor.
    shape, values, scales = parts.get(SHAPE), parts.get(VALUES), parts[SCALES]
    if shape is not None and (
        shape.dim() != 3 or shape.shape[0] != 0 or shape.dtype not in FLOATS or shape.shape[2] > MOST_COLS
    ):
        raise CAPError(f"{name} has int8 numbers and a {SHAPE} of no weight of a Linear: the file is damaged")
    if values is not None and values.dtype != INTEGERS.get(values.element_size()):
        raise CAPError(f"{name} has int8 numbers in {values.dtype}, which are no blocks of them: the file is damaged")
    check_parts(_blocks(parts), name)
    if shape is None or scales.dtype != torch.int32 or scales.shape != shape.shape[1:2]:
        raise CAPError(f"{name} has not one scale per row: the file is damaged")
    if scales.is_meta or values is None:
        return
    floats = scales.view(torch.float32)
    if not bool(((floats >= 0) & (floats <= LARGEST_SCALE)).all()):  # a NaN is neither
        raise CAPError(f"{name} has a scale that is NaN, negative or too large: the file is damaged")
    if values.numel() and int(values.reshape(-1).view(torch.int8).min()) < -LARGEST:
        raise CAPError(f"{name} has -128 among its int8 numbers, which end at -{LARGEST}: the file is damaged")


def _blocks(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parts of the packed integers that the blocks of an int8 weight are."""
    blocks = {suffix: part for suffix, part in parts.items() if suffix != SCALES}
    if SHAPE in parts and VALUES in parts:
        _, rows, cols = parts[SHAPE].shape
        size = parts[VALUES].element_size()
        blocks[SHAPE] = torch.empty((0, rows, -(-cols // size)), dtype=torch.uint8)
    return blocks
