"""Signs of life that processes give each other, so that none waits for one that is gone.

Neither the launcher nor a backend does this work. `accelerate launch` notices a process of its own machine that has
ended, but neither one that was stopped nor another machine. gloo and NCCL notice a closed connection once they use it,
which may be hours later, and silence only after their timeout, which has to be longer than any work between two
collectives (see accelerator.py).
"""

import os
import threading
from contextlib import suppress

import torch.distributed as dist

# Seconds between two signs of life, how many may be missed, and how many before the first: starting takes time.
INTERVAL, MISSED, MISSED_AT_START = 4.0, 10, 100
# The count of a process that has finished, and may be silent, is at least this.
DONE = 2**62


def connect() -> dist.Store:
    """Return a client of its own of the run's store, where launchers say that it is.

    One client answers one request at a time, and NCCL lets the one that the process group has wait for minutes while
    it connects: signs of life must not wait for that.
    """
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
    )


class Heartbeat:
    """Counts in the run's store, which rise as long as their processes live.

    Silence is counted in looks of the process that listens, so that a machine that slept as a whole does not end the
    run.

    Args:
        rank: of this process.
        world: how many there are.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.counts, self._last, self._missed = [0] * world, [0] * world, [0] * world
        self._finished = threading.Event()
        # A store whose machine is cut off does not answer, not even that it fails: beats have a thread of their own.
        self._thread = threading.Thread(target=self._run, name="cap_hf heartbeat", daemon=True)

    def start(self) -> None:
        """Beat from now on, in a thread."""
        self._thread.start()

    def finish(self) -> None:
        """Tell the others that silence from here on means nothing."""
        self._finished.set()
        self._thread.join(INTERVAL)

    def beat(self, store: dist.Store, by: int = 1) -> None:
        """Give a sign of life and read everyone's, this process's as well.

        Raises:
            RuntimeError: the store is gone.
        """
        for rank in range(len(self.counts)):
            self.counts[rank] = store.add(f"cap_hf/{rank}", by if rank == self.rank else 0)

    def look(self) -> list[int]:
        """Return who has been silent for too many looks; this process itself where the store does not answer."""
        for rank, count in enumerate(self.counts):
            self._missed[rank] = self._missed[rank] + 1 if count == self._last[rank] else 0
            self._last[rank] = count
        if all(count >= DONE for rank, count in enumerate(self._last) if rank != self.rank):
            return []
        return [
            rank
            for rank, (count, missed) in enumerate(zip(self._last, self._missed, strict=True))
            if count < DONE and missed >= (MISSED if count else MISSED_AT_START)
        ]

    def _run(self) -> None:
        # That the store is gone is silence, which `look` notices.
        with suppress(RuntimeError):
            store = connect()
            self.beat(store)
            while not self._finished.wait(INTERVAL):
                self.beat(store)
            self.beat(store, DONE)
