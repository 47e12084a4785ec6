"""Sums of outer products, symmetric, of which little more than half is stored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from cap_hf.errors import CAPError
from cap_hf.memory import zeros
from cap_hf.targets import summarize

# A symmetric sum is cut into strips of at least this height, and at most so many of them.
STRIP_ROWS, MAX_STRIPS = 16, 6

# Returns a tensor of zeros of a shape, a dtype and a device.
Make = Callable[[Sequence[int], torch.dtype, torch.device], torch.Tensor]


class SymmetricSums:
    """Several B x B sums of outer products, `sum g g^T`, as strips of rows.

    Strip i holds rows `edges[i]` to `edges[i + 1]` and the columns before `edges[i + 1]`; what lies above the diagonal
    beyond that is what lies below it.

    Args:
        size: B.
        strips: each `(count, edges[i + 1] - edges[i], edges[i + 1])`.
    """

    def __init__(self, size: int, strips: list[torch.Tensor]) -> None:
        self.size, self.strips, self.edges = size, strips, strip_edges(size)

    @classmethod
    def zeros(
        cls, count: int, size: int, dtype: torch.dtype, device: torch.device, make: Make = zeros
    ) -> "SymmetricSums":
        """Return `count` matrices of zeros, in memory that `make` takes."""
        edges = strip_edges(size)
        shapes = [(count, stop - start, stop) for start, stop in pairwise(edges)]
        return cls(size, [make(shape, dtype, device) for shape in shapes])

    def __len__(self) -> int:
        return len(self.strips[0])

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that is summed in."""
        return self.strips[0].dtype

    def add(self, blocks: slice, factors: torch.Tensor) -> None:
        """Add `factors[b].T @ factors[b]` to some of the matrices, for factors `(n, samples, B)`.

        Factors of another dtype are multiplied in theirs.
        """
        for strip, start, stop in self._edged(self.strips):
            left, right = factors[:, :, start:stop].mT, factors[:, :, :stop]
            if factors.dtype == strip.dtype:
                strip[blocks].baddbmm_(left, right)
            else:
                strip[blocks].add_(left @ right)

    def full(self, index: slice | torch.Tensor = slice(None), dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Return some of the matrices, whole, `(n, B, B)`, as a new tensor."""
        rows = [strip[index] for strip in self.strips]
        full = torch.empty(len(rows[0]), self.size, self.size, dtype=dtype, device=rows[0].device)
        for strip, start, stop in self._edged(rows):
            full[:, start:stop, :stop] = strip
            full[:, :start, start:stop] = strip[:, :, :start].mT
        return full

    def diagonals(self) -> torch.Tensor:
        """Return the diagonals, `(count, B)`."""
        return torch.cat([strip.diagonal(start, 1, 2) for strip, start, _ in self._edged(self.strips)], dim=1)

    def _edged(self, strips: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, int, int]]:
        return ((strip, *edges) for strip, edges in zip(strips, pairwise(self.edges), strict=True))


def strip_edges(size: int) -> list[int]:
    """Return where the strips of a symmetric B x B matrix begin, and B."""
    strips = max(1, min(MAX_STRIPS, size // STRIP_ROWS))
    return [size * index // strips for index in range(strips + 1)]


def sums_per_block(size: int) -> int:
    """Return how many entries are stored of a symmetric B x B matrix."""
    return sum((stop - start) * stop for start, stop in pairwise(strip_edges(size)))


def check_finite(sums: Mapping[str, torch.Tensor], of: str = "gradients") -> None:
    """Raise a CAPError that names the first layers whose sums of squares are not finite, and what they are sums of."""
    broken = [name for name, each in sums.items() if not each.sum().isfinite()]
    if broken:
        raise CAPError(
            f"{of} are NaN or infinite in {summarize(broken, 3)}: check the model's weights and its dtype "
            "(load it in float32) and the pixel values"
        )
