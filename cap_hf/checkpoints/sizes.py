"""What a model's weights take in compressed form, and how a weight's bytes fall with its non-zero entries."""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from cap_hf.checkpoints.form import stored_dtypes
from cap_hf.checkpoints.weights import HEADER_BYTES, count_bytes, to_stored

# How many entries were removed, and the bytes that are left, from none removed on.
Points = list[tuple[int, int]]


def saved_tensors(model: nn.Module, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Yield each tensor that a model saves, what several names share only once, with the dtype that it is saved in.

    Args:
        model: of transformers.
        dtype: that floating point numbers are saved in; None for their own.
    """
    wanted = {} if dtype is None else {name: each for name, _, each in stored_dtypes(model, dtype)}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (name, tensor.shape)
        if place not in seen:
            seen.add(place)
            yield name, tensor.detach(), wanted.get(name, tensor.dtype)


def measure_model(model: nn.Module, dtype: torch.dtype | None = None, without: Collection[str] = ()) -> tuple[int, int]:
    """Return the bytes of a model's tensors: dense, and as a compressed checkpoint stores them, bit for bit.

    Args:
        model: of transformers.
        dtype: that it is saved in; None for its own.
        without: names of tensors that are left out.
    """
    dense = compressed = 0
    for name, tensor, wanted in saved_tensors(model, dtype):
        if name not in without:
            dense += tensor.numel() * wanted.itemsize
            compressed += count_bytes(to_stored(name, tensor.to("cpu", wanted)))
    return dense, compressed


def compressed_points(numel: int, itemsize: int, unit: int = 1) -> Points:
    """Return what a weight takes in a compressed checkpoint with ever more of its entries 0; linear in between.

    A bit for each entry says whether it is kept, and the kept ones follow; that is stored where it is smaller than the
    dense weight, with what its names take in a header (see `to_stored`). Zeros that keep to N:M may take less.

    Args:
        numel: entries.
        itemsize: bytes of one.
        unit: entries that are removed together; removals are counted in these.
    """
    units, dense, bitmask = numel // unit, numel * itemsize, -(-numel // 8)
    # The most removals with which it stays dense.
    flat = (bitmask + HEADER_BYTES) // (itemsize * unit)
    if flat >= units:
        return [(0, dense), (units, dense)]
    packed = [(removed, (numel - removed * unit) * itemsize + bitmask) for removed in (flat + 1, units)]
    # Where the two are the same number of removals there is one point.
    return list(dict([(0, dense), (flat, dense), *packed]).items())
