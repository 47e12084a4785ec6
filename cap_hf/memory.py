"""Fresh memory for large tensors."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

# Bytes of a page that is asked for where memory is large.
HUGE_PAGE = 2 * 2**20
# Where a tensor may begin, in bytes: at a line of the cache.
ALIGNMENT = 64


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what `torch.zeros` does, but large tensors on a CPU are in pages of 2 MiB where the system has them.

    The first touch of a small page takes longer than filling it: a tensor of them takes three times as long.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.frombuffer(fresh(size), dtype=dtype).view(*shape)


def fresh(size: int) -> mmap.mmap:
    """Return so many bytes of zeros that nothing has touched, in large pages where the system has them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def release() -> None:
    """Give memory that is free back to the system: the C library keeps what lies between tensors that stay.

    It does nothing where that library is not glibc.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class Arena:
    """Memory of a CPU for tensors that all go together, to be used again for the next ones.

    The first touch of memory that is fresh from the system takes up to ten times as long as filling it again.

    Args:
        size: bytes that there will be at a time, at most; what is more is fresh each time.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory: mmap.mmap | None = None
        self._used, self._touched = 0, 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return what `torch.zeros` does; it is good until `reuse`."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        stop = start + math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or start == stop or stop > self.size or not hasattr(mmap, "MADV_HUGEPAGE"):
            return zeros(shape, dtype, device)
        if self._memory is None:
            self._memory = fresh(self.size)
        found = torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape), offset=start).view(*shape)
        if start < self._touched:
            found.zero_()
        self._used, self._touched = stop, max(self._touched, stop)
        return found

    def reuse(self) -> None:
        """Begin again: tensors that come now take the memory of those before."""
        self._used = 0

    def clear(self) -> None:
        """Give the memory back, once no tensor is in it any more."""
        self._memory = None
        self._used = self._touched = 0
