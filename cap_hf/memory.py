"""Fresh memory, and how many bytes are told to people."""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

# Bytes of a page that is asked for where memory is large.
HUGE_PAGE = 2 * 2**20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what `torch.zeros` does, but large tensors on a CPU are in pages of 2 MiB where the system has them.

    The first touch of a small page takes longer than filling it: a tensor of them takes three times as long.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def readable(size: float) -> str:
    """Return a number of bytes as `1.5 GB`, `23.0 MB`, `4.1 kB` or `96 bytes`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # A tenth of a unit is said in it: below that the next smaller one has more digits.
        if size >= scale / 10:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"
