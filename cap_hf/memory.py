"""Fresh memory for large tensors."""

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
