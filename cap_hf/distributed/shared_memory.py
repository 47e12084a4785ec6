"""Memory that all processes of one machine map: each reads what others send it where they have written it."""

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from cap_hf.distributed.processes import Processes, processes_here

# Rounds whose memory is there at a time. A process may send one round before it waits for the one before: by then the
# others have sent that, and read all but the last two before it.
SLOTS = 4
# Random bytes by which a process knows another one's file.
MARK_BYTES = 7


class SharedMemory:
    """A file in memory of each process, without a name, in which it writes what it sends to each of them.

    A round is announced through the backend of the processes, the content is not. All methods are collective, as those
    of `Processes`; see `open_shared_memory`.

    Args:
        processes: of the run, all on this machine.
        file: descriptor of this process's file; it is closed with this.
        others: for each process, this one included, a path that its file can be opened by.
    """

    def __init__(self, processes: Processes, file: int, others: Sequence[str]) -> None:
        self.processes, self.others = processes, list(others)
        self._file, self._maps = file, list[mmap.mmap]()
        self._capacity, self._round = 0, 0
        weakref.finalize(self, os.close, file)

    def room(self, sizes: Sequence[int], dtype: torch.dtype, most: int) -> list[torch.Tensor]:
        """Return where to write what is sent in the next round.

        Args:
            sizes: entries for each process.
            dtype: of the entries, the same on every process.
            most: entries that a process sends another one in this round, at most; the same on every process.

        Returns:
            For each process `(size,)`; no more than one round may be waited for when it is asked for.
        """
        if most * dtype.itemsize > self._capacity:
            self._grow(most * dtype.itemsize)
        self._round += 1
        rank = self.processes.rank
        return [self._part(rank, to, size, dtype) for to, size in enumerate(sizes)]

    def send(self, sizes: Sequence[int], dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
        """Announce what was written; return what waits for all others and gives what each process sends here.

        Args:
            sizes: entries that come from each process.
            dtype: of the entries.
        """
        rank = self.processes.rank
        parts = [self._part(sender, rank, size, dtype) for sender, size in enumerate(sizes)]
        wait = self.processes.meet()

        def arrived() -> list[torch.Tensor]:
            wait()
            return parts

        return arrived

    def _grow(self, capacity: int) -> None:
        """Make room for parts of so many bytes; all that was sent is read by now."""
        # Parts begin at a page each.
        self._capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        size = SLOTS * self.processes.world * self._capacity
        os.ftruncate(self._file, size)
        self.processes.meet()()
        self._maps = []
        for path in self.others:
            with open(path, "r+b") as file:
                self._maps.append(mmap.mmap(file.fileno(), size))

    def _part(self, sender: int, to: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the memory of what one process sends another one in this round."""
        if not size:
            return torch.empty(0, dtype=dtype)
        slot = self._round % SLOTS * self.processes.world
        return torch.frombuffer(self._maps[sender], dtype=dtype, count=size, offset=(slot + to) * self._capacity)


def open_shared_memory(processes: Processes) -> SharedMemory | None:
    """Return memory that all processes share; None where there is none: on GPUs, on several machines, or alone.

    It is asked for, and given or not, on all processes together.
    """
    if processes.world == 1 or processes.device.type != "cpu":
        return None
    mark, file = os.urandom(MARK_BYTES), -1
    if processes_here() == processes.world:
        with suppress(AttributeError, OSError):  # not on Linux, or not allowed
            file = os.memfd_create("cap_hf")
            os.write(file, mark)
    everyone = processes.gather_ints(os.getpid(), file, int.from_bytes(mark, "big"))
    paths = [f"/proc/{pid}/fd/{number}" for pid, number, _ in everyone]
    found = all(
        holds(path, number.to_bytes(MARK_BYTES, "big")) for path, (*_, number) in zip(paths, everyone, strict=True)
    )
    if all(each for (each,) in processes.gather_ints(int(found))):
        return SharedMemory(processes, file, paths)
    if file >= 0:
        os.close(file)
    return None


def holds(path: str, mark: bytes) -> bool:
    """Return whether a file can be written to, and begins with a mark."""
    try:
        with open(path, "r+b") as file:
            return file.read(len(mark)) == mark
    except OSError:  # of another user, in another container, or none
        return False
