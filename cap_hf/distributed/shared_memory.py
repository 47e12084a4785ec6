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
        files: descriptors of the file of each process, this one's own among them; they are closed with this.
    """

    def __init__(self, processes: Processes, files: Sequence[int]) -> None:
        self.processes, self.files = processes, list(files)
        self._maps: list[mmap.mmap] = []
        self._capacity, self._round = 0, 0
        weakref.finalize(self, close, self.files)

    def fits(self, capacity: int) -> bool:
        """Make room for parts of so many bytes in each round; return whether it can be had, the same on all processes.

        All that was sent before must have been read.
        """
        if capacity <= self._capacity:
            return True
        # Parts begin at a page each.
        capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        size, maps = SLOTS * self.processes.world * capacity, list[mmap.mmap]()
        if not self._all(lambda: os.ftruncate(self.files[self.processes.rank], size)):
            return False
        if not self._all(lambda: maps.extend(mmap.mmap(file, size) for file in self.files)):
            return False
        self._capacity, self._maps = capacity, maps
        return True

    def _all(self, work: Callable[[], None]) -> bool:
        """Do something that the system may refuse; return whether it has refused it to no process."""
        done = 0
        with suppress(OSError):
            work()
            done = 1
        return all(each for (each,) in self.processes.gather_ints(done))

    def room(self, sizes: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return where to write what is sent in the next round.

        Args:
            sizes: entries for each process, of no more bytes than `fits` was asked for.
            dtype: of the entries, the same on every process.

        Returns:
            For each process `(size,)`; no more than one round may be waited for when it is asked for.
        """
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
    mark, own = os.urandom(MARK_BYTES), -1
    if processes_here() == processes.world:
        with suppress(AttributeError, OSError):  # not on Linux, or not allowed
            own = os.memfd_create("cap_hf")
            os.write(own, mark)
    everyone = processes.gather_ints(os.getpid(), own, int.from_bytes(mark, "big"))
    files = [
        opened(f"/proc/{pid}/fd/{file}", number.to_bytes(MARK_BYTES, "big")) if file >= 0 else -1
        for pid, file, number in everyone
    ]
    found = all(each for (each,) in processes.gather_ints(int(min(files) >= 0)))
    if own >= 0:
        # It is open a second time, as those of the others are.
        os.close(own)
    if found:
        return SharedMemory(processes, files)
    close(files)
    return None


def opened(path: str, mark: bytes) -> int:
    """Return a descriptor of a file that can be written to and begins with a mark; -1 where it is none."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # of another user, in another container, or none
        return -1
    if os.pread(file, len(mark), 0) == mark:
        return file
    os.close(file)
    return -1


def close(files: Sequence[int]) -> None:
    """Close the descriptors of the files that were opened."""
    for file in files:
        if file >= 0:
            os.close(file)
