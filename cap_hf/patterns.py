"""Rules that the zeros of a row keep to: N:M, and blocks that go or stay as a whole."""

from dataclasses import dataclass

from cap_hf.errors import CAPError


@dataclass(frozen=True)
class BlockPattern:
    """Each `m` consecutive input channels of a row are 0 together or stay together, whatever they are: 1xM blocks."""

    m: int

    @property
    def unit(self) -> int:
        """Return how many weights are removed together."""
        return self.m

    def steps(self, size: int) -> int:
        """Return how many blocks `size` consecutive weights have; M divides `size`."""
        return size // self.m

    def __str__(self) -> str:
        return f"1x{self.m}"


BLOCK_PATTERNS = {str(pattern): pattern for pattern in (BlockPattern(2), BlockPattern(4), BlockPattern(8))}


@dataclass(frozen=True)
class NMPattern:
    """At most `n` weights that are not 0 in every `m` consecutive input channels of a row."""

    n: int
    m: int

    @property
    def unit(self) -> int:
        """Return how many weights are removed together."""
        return 1

    @property
    def sparsity(self) -> float:
        """Return the share of weights that are 0."""
        return 1 - self.n / self.m

    def steps(self, size: int) -> int:
        """Return how many of `size` consecutive weights are removed; M divides `size`."""
        return size // self.m * (self.m - self.n)

    def check_sparsity(self, sparsity: float) -> None:
        """Raise a CAPError if a sparsity is not the one that the pattern has."""
        if abs(sparsity - self.sparsity) > 1e-9:
            raise CAPError(
                f"sparsity {sparsity:g} contradicts {self}, which is sparsity {self.sparsity:g}: leave it out"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = NMPattern | BlockPattern


def unit_of(pattern: Pattern | None) -> int:
    """Return how many weights are removed together."""
    return 1 if pattern is None else pattern.unit
