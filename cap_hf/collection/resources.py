"""What a collection may use. Imports neither torch nor transformers, so that a wrong argument is found at once."""

import re
from dataclasses import dataclass, field

from cap_hf.errors import CAPError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class Resources:
    """What a collection may use; nothing here changes the result but the block size that `auto` finds.

    Raises:
        CAPError: a value is outside what its field allows.
    """

    max_memory: str | None = field(
        default=None,
        metadata={"help": "Memory a process may take, such as 8GB; on GPUs the device's. Default: what is free."},
    )
    max_passes: int | None = field(
        default=None,
        metadata={
            "help": "Passes over the examples at most. Default: as many as the memory asks for; with "
            "--fisher_block_size auto, 1."
        },
    )
    spill_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for what several passes keep on the disk, where that takes less time than collecting it "
            "anew; `none` keeps nothing there. Default: the system's temporary one."
        },
    )

    def __post_init__(self) -> None:
        _ = self.bytes
        if self.max_passes is not None and self.max_passes < 1:
            raise CAPError(f"max_passes={self.max_passes} must be at least 1")

    @property
    def spills_nothing(self) -> bool:
        """Whether nothing may go to the disk."""
        return self.spill_dir == "none"

    @property
    def bytes(self) -> int | None:
        """`max_memory` in bytes."""
        if self.max_memory is None:
            return None
        match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT]?I?)B?\s*", str(self.max_memory).upper())
        if not match or match[2] not in UNITS or not float(match[1]):
            raise CAPError(f"max_memory={self.max_memory!r} is not a size such as 8GB or 500MiB")
        return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Afterwards:
    """What a collection is made for, by which it is planned; it changes no result.

    Attributes:
        prunes: how many sparsities will be pruned to.
        refits: whether layers will be refitted after each of them.
        rounds: how often new weights will be made of all of them: of a search, once for each try.

    Raises:
        CAPError: there is no prune.
    """

    prunes: int = 1
    refits: bool = False
    rounds: int = 1

    def __post_init__(self) -> None:
        for name in ("prunes", "rounds"):
            if getattr(self, name) < 1:
                raise CAPError(f"{name}={getattr(self, name)} must be at least 1")
