"""The compressed format: a sparse tensor as its non-zero entries and where they were, bit for bit.

An entry is zero when all its bits are 0, so -0.0 is kept and comes back as -0.0. A packed tensor `X` is stored as
ordinary tensors named after it:

- `X.cap_shape`: uint8 of shape `(0, *shape)`, which takes no bytes;
- `X.cap_values`: the kept entries in order, `(kept,)` with a bitmask, `(numel / M, N)` with codes;
- either `X.cap_bitmask`: uint8 `(ceil(numel / 8),)`, entry i in bit `i % 8` of byte `i // 8`;
- or `X.cap_codes`: for N:M, 8 entries at a time, the rank of their bitmask byte among the bytes in which each group
  of M bits has N ones, in the fewest bits that hold it: 3 bits for a group of 2:4 where a bitmask takes 4. Eight
  codes of w bits fill w bytes, the first in the lowest bits.

The order is the order of memory; in a 4-dimensional tensor (a convolution) with the input channels last, so that its
N:M groups are neighbours.

A byte of a bitmask or a code stands for 8 entries, so a file grows to 64 times its size at most when it is unpacked.
Weights that are stored in int8 have a part more, lose what rounding takes, and grow to 512 times: `int8.py`.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from cap_hf.errors import CAPError
from cap_hf.memory import zeros

# What config.json calls the format, and the names of its weight files.
QUANT_METHOD = "cap_hf"
# The version rises where an earlier cap_hf could not read a file: one with int8 weights has the second.
FORMAT_VERSION, INT8_FORMAT_VERSION = 1, 2
COMPRESSED_NAME, COMPRESSED_INDEX_NAME = "model.cap.safetensors", "model.cap.safetensors.index.json"
# `transformers_weights` of a compressed checkpoint's config.json: transformers looks for no other file, and quotes
# this in the error it raises when nobody has put the file's name in its place.
IMPORT_HINT = "this checkpoint is compressed: pip install cap_hf, then `import cap_hf` before from_pretrained"
SHAPE, VALUES, BITMASK, CODES = "cap_shape", "cap_values", "cap_bitmask", "cap_codes"
SCALES = "cap_scales"  # of int8 weights only
PARTS = (SHAPE, VALUES, BITMASK, CODES, SCALES)
# The M of N:M that have codes; anything else is stored with a bitmask.
GROUP_SIZES = (2, 4, 8)
# Entries that are worked on at a time, so that what is made of them stays in cache.
CHUNK = 1 << 17
# Eight codes in a word of 64 bits, one per byte, are brought together in three steps: each code to its neighbour, each
# pair to its neighbour, each half to the other; and apart in the opposite order. Per step: the width of what is moved,
# in bits, and a word with a 1 where each pair of them begins.
LANES = ((8, 0x0001000100010001), (16, 0x0000000100000001), (32, 1))
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BYTES = np.arange(256, dtype=np.uint8)
# The most ones in a group of M bits of each byte.
MOST = {
    m: np.max([np.bitwise_count(BYTES >> shift & 2**m - 1) for shift in range(0, 8, m)], axis=0) for m in GROUP_SIZES
}


def pack(tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Return the parts of a tensor by their suffix, in the form that takes fewest bytes; None if that is the dense one.

    Args:
        tensor: on the CPU, any shape and any dtype of 1, 2, 4 or 8 bytes.
    """
    size = tensor.element_size()
    if size not in INTEGERS or not tensor.numel():
        return None
    flat = _in_group_order(tensor.detach()).contiguous().view(-1).view(INTEGERS[size]).numpy()
    bitmask = _mark(flat)
    kept = _count(bitmask)
    sizes: dict[tuple[int, int] | None, int] = {None: kept * size + bitmask.size}
    if flat.size % 8 == 0 and kept:
        # The bytes that occur in the bitmask say which N:M patterns hold.
        seen = np.bincount(bitmask, minlength=256) > 0
        for m in GROUP_SIZES:
            n = int(MOST[m][seen].max())
            if n < m:
                sizes[n, m] = flat.size // m * n * size + _code_bytes(flat.size, n, m)
    best = min(sizes, key=lambda form: sizes[form])
    if sizes[best] >= flat.size * size:
        return None
    parts = {SHAPE: torch.empty((0, *tensor.shape), dtype=torch.uint8)}
    if best is None:
        values = torch.from_numpy(_gather(flat, bitmask, kept)).view(tensor.dtype)
        return parts | {VALUES: values, BITMASK: torch.from_numpy(bitmask)}
    n, m = best
    if kept < flat.size // m * n:
        # A group with fewer than N non-zero entries keeps some zeros as well.
        bitmask = _covers(n, m).take(bitmask)
    values = torch.from_numpy(_gather(flat, bitmask, flat.size // m * n)).view(tensor.dtype).view(-1, n)
    return parts | {VALUES: values, CODES: torch.from_numpy(_pack_codes(bitmask, n, m))}


def unpack(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the dense tensor, on the device of its parts and with the dtype of its values.

    Args:
        parts: what `pack` returned, its values perhaps cast to another dtype.

    Raises:
        CAPError: the parts contradict each other.
    """
    bitmask = check_parts(parts, "a packed tensor")
    values, shape = parts[VALUES], tuple(parts[SHAPE].shape[1:])
    if bitmask is None:
        return torch.empty(shape, dtype=values.dtype, device=values.device)
    is_conv = len(shape) == 4
    order = (shape[0], *shape[2:], shape[1]) if is_conv else shape
    kept = values.contiguous().view(-1).view(INTEGERS[values.element_size()])
    flat = zeros([math.prod(shape)], kept.dtype, kept.device)
    if values.device.type == "cpu":
        _scatter(flat.numpy(), bitmask.numpy(), kept.numpy())
    else:
        _scatter_on_device(flat, bitmask, kept)
    dense = flat.view(values.dtype).view(order)
    return dense.movedim(-1, 1).contiguous() if is_conv else dense


def check_parts(parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """Return the bitmask of a packed tensor whose parts fit each other; None if they are on the meta device.

    Values are looked at for their shape and the size of their dtype only.

    Raises:
        CAPError: a part is missing or superfluous, or their shapes, dtypes or numbers of entries disagree.
    """
    if set(parts) not in ({SHAPE, VALUES, BITMASK}, {SHAPE, VALUES, CODES}):
        raise CAPError(f"{name} has the parts {', '.join(sorted(parts)) or 'none'}: the file is damaged")
    shape, values, where = parts[SHAPE], parts[VALUES], parts[BITMASK if BITMASK in parts else CODES]
    if shape.dim() < 1 or shape.shape[0] != 0 or not math.prod(shape.shape[1:]):
        raise CAPError(f"{name} has a {SHAPE} that is not (0, ...) of a tensor with entries: the file is damaged")
    if where.dtype != torch.uint8 or where.dim() != 1 or values.element_size() not in INTEGERS:
        raise CAPError(f"{name} has a bitmask, codes or values of a wrong dtype or shape: the file is damaged")
    numel = math.prod(shape.shape[1:])
    if BITMASK in parts:
        if values.dim() != 1 or where.numel() != -(-numel // 8):
            raise CAPError(f"{name} has a bitmask or values of a wrong shape: the file is damaged")
        if where.is_meta:
            return None
        kept = _count(where.cpu().numpy())
        if kept != values.numel() or (numel % 8 and int(where[-1]) >> numel % 8):
            raise CAPError(f"{name} has {values.numel()} values, its bitmask marks {kept}: the file is damaged")
        return where.contiguous()
    groups, n = values.shape if values.dim() == 2 else (0, 0)
    m = numel // groups if groups else 0
    if m not in GROUP_SIZES or groups * m != numel or numel % 8 or not 0 < n < m:
        raise CAPError(f"{name} has values that are no N:M groups of its shape: the file is damaged")
    if where.numel() != _code_bytes(numel, n, m):
        raise CAPError(f"{name} has codes of a wrong length for {n}:{m}: the file is damaged")
    if where.is_meta:
        return None
    bitmask = _unpack_codes(where, n, m)
    # What fills up the last eight codes is 0; a code beyond the patterns became 0, which no pattern is.
    if not bool(bitmask[: numel // 8].all()) or bool((bitmask[numel // 8 :] != _patterns(n, m)[0]).any()):
        raise CAPError(f"{name} has a code that is no {n}:{m} pattern: the file is damaged")
    return bitmask[: numel // 8]


def _in_group_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view with the input channels of a convolution last, so that its N:M groups are neighbours."""
    return tensor.movedim(1, -1) if tensor.dim() == 4 else tensor


def _count(bitmask: np.ndarray) -> int:
    """Return the number of ones in all bits."""
    whole = bitmask.size // 8 * 8
    words = np.bitwise_count(bitmask[:whole].view(np.uint64)).sum(dtype=np.int64)
    return int(words) + int(np.bitwise_count(bitmask[whole:]).sum(dtype=np.int64))


def _mark(flat: np.ndarray) -> np.ndarray:
    """Return the bitmask of the non-zero entries."""
    bitmask = np.empty(-(-flat.size // 8), dtype=np.uint8)
    for first in range(0, flat.size, CHUNK):
        marks = np.packbits(flat[first : first + CHUNK] != 0, bitorder="little")
        bitmask[first // 8 : first // 8 + marks.size] = marks
    return bitmask


def _indices(bitmask: np.ndarray, first: int) -> np.ndarray:
    """Return where the bits of the chunk that begins with entry `first` are 1, counted from there."""
    marks = np.unpackbits(bitmask[first // 8 : (first + CHUNK) // 8], bitorder="little")
    return np.flatnonzero(marks.view(bool))


def _gather(flat: np.ndarray, bitmask: np.ndarray, kept: int) -> np.ndarray:
    """Return the `kept` entries that the bitmask marks, in order."""
    values, start = np.empty(kept, dtype=flat.dtype), 0
    for first in range(0, flat.size, CHUNK):
        # Indices are several times as fast as indexing with a mask.
        indices = _indices(bitmask, first)
        # Without a mode numpy writes into a buffer first, to raise an error on an index that is none.
        flat[first : first + CHUNK].take(indices, out=values[start : start + indices.size], mode="clip")
        start += indices.size
    return values


def _scatter(flat: np.ndarray, bitmask: np.ndarray, values: np.ndarray) -> None:
    """Put the values where the bitmask has a 1; `flat` holds zeros."""
    start = 0
    for first in range(0, flat.size, CHUNK):
        indices = _indices(bitmask, first)
        flat[first : first + CHUNK][indices] = values[start : start + indices.size]
        start += indices.size


def _scatter_on_device(flat: torch.Tensor, bitmask: torch.Tensor, values: torch.Tensor) -> None:
    """Do what `_scatter` does in PyTorch, for any device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    marks = ((bitmask[:, None] >> shifts) & 1).bool().view(-1)[: flat.numel()]
    flat.masked_scatter_(marks, values)


@lru_cache
def _patterns(n: int, m: int) -> np.ndarray:
    """Return the bytes in which each group of m bits has n ones, ascending, uint8; a code is an index into them."""
    return np.array(
        [byte for byte in range(256) if all((byte >> shift & 2**m - 1).bit_count() == n for shift in range(0, 8, m))],
        dtype=np.uint8,
    )


@lru_cache
def _covers(n: int, m: int) -> np.ndarray:
    """Return the smallest of `_patterns` with all ones of each byte, uint8 `(256,)`; of no meaning where none has."""
    bytes_ = np.arange(256)[:, None]
    return _patterns(n, m)[((_patterns(n, m) & bytes_) == bytes_).argmax(axis=1)]


def _code_width(n: int, m: int) -> int:
    """Return the bits of a code."""
    return (len(_patterns(n, m)) - 1).bit_length()


def _code_bytes(numel: int, n: int, m: int) -> int:
    """Return the bytes that the codes of a tensor take."""
    return -(-numel // 64) * _code_width(n, m)


def _pack_codes(bitmask: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return the codes of a bitmask that holds bytes of `_patterns` only."""
    width = _code_width(n, m)
    ranks = np.zeros(256, dtype=np.uint8)
    ranks[_patterns(n, m)] = np.arange(len(_patterns(n, m)))
    codes = np.zeros(-(-bitmask.size // 8) * 8, dtype=np.uint8)
    ranks.take(bitmask, out=codes[: bitmask.size], mode="clip")
    words = codes.view("<u8")
    for bits, units in LANES:
        taken, low = bits // 8 * width, units * (2**bits - 1)
        words = words & low | (words & low << bits) >> bits - taken
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :width]).reshape(-1)


def _unpack_codes(packed: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Undo `_pack_codes` on any device, to whole words of 8 bytes; what is no code becomes 0."""
    width = _code_width(n, m)
    padded = np.zeros(256, dtype=np.uint8)
    padded[: len(_patterns(n, m))] = _patterns(n, m)
    table = torch.from_numpy(padded).to(packed.device)
    bitmask = torch.zeros((packed.numel() // width, 8), dtype=torch.uint8, device=packed.device)
    bitmask[:, :width] = packed.reshape(-1, width)
    # Chunks that stay in cache, and that PyTorch does not split among its threads.
    for chunk in bitmask.view(-1).split(1 << 15):
        words = chunk.view(torch.int64)
        for bits, units in reversed(LANES):
            taken = bits // 8 * width
            low = units * (2**taken - 1)
            words = words & low | (words & low << taken) << bits - taken
        # Several times as fast as `table[...]`.
        chunk.copy_(table.index_select(0, words.view(torch.uint8).int()))
    return bitmask.view(-1)
