"""Ends a process of a run with one line when another one is gone, whatever it is doing: never a hang."""

import os
import re
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from types import TracebackType

import torch.distributed as dist

# Seconds between two signs of life, and how many may be missed.
INTERVAL, MISSED = 4.0, 10


def lost_peer(error: BaseException) -> bool:
    """Whether an error is what a backend raises when another process is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|nccl|connection (closed|reset|refused)", text) is not None
    )


class Heartbeat:
    """Signs of life of all processes in the run's store.

    Silence is counted in own beats, so that a machine that slept or was paused as a whole does not end the run.

    Args:
        store: that all processes reach.
        rank: of this process.
        world: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.store, self.rank = store, rank
        self.beats = 0
        self.last = dict.fromkeys((other for other in range(world) if other != rank), b"")
        self.missed = dict.fromkeys(self.last, 0)

    def beat(self) -> int | None:
        """Give a sign of life and look for those of the others; returns the rank of one that is gone."""
        self.beats += 1
        self.store.set(f"cap_hf/{self.rank}", str(self.beats))
        for other, last in self.last.items():
            key = f"cap_hf/{other}"
            value = self.store.get(key) if self.store.check([key]) else b""
            quiet = value == last and value != b"done"
            self.missed[other] = self.missed[other] + 1 if quiet else 0
            self.last[other] = value
        return next((other for other, missed in self.missed.items() if missed >= MISSED), None)

    def done(self) -> None:
        """This process has finished and will be silent."""
        self.store.set(f"cap_hf/{self.rank}", "done")


class Watch:
    """Watches the other processes from a thread while the main one works, or waits in a collective.

    It reacts to the launcher's signal to end, which Python's own handlers would only see after the collective, and
    to a process that gives no sign of life: killed on another machine, stopped, or cut off.

    Args:
        command: for the line that is printed.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.heartbeat: Heartbeat | None = None
        self._finished = threading.Event()
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="cap_hf watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._descriptor = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finished.set()
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGTERM, self._handler)
        self._wakeup.send(b"\0")
        self._thread.join()

    def finish(self) -> None:
        """The work is done: silence from here on means nothing."""
        self._finished.set()
        if self.heartbeat is not None:
            with suppress(RuntimeError, dist.DistError):
                self.heartbeat.done()

    def _run(self) -> None:
        while not self._finished.is_set():
            if select.select([self._signals], [], [], INTERVAL)[0] and not self._finished.is_set():
                if signal.SIGTERM in self._signals.recv(64):
                    self._end("told to end, because another process has ended or the launcher was stopped")
                continue
            self._look()

    def _look(self) -> None:
        if not dist.is_initialized() and self.heartbeat is None:
            return
        try:
            if self.heartbeat is None:
                store = dist.distributed_c10d._get_default_store()
                self.heartbeat = Heartbeat(store, dist.get_rank(), dist.get_world_size())
            gone = self.heartbeat.beat()
        except (RuntimeError, dist.DistError):
            # The store goes with the run: soon after it where that ended well.
            if not self._finished.wait(2 * INTERVAL):
                self._end("the first process of this run has ended or cannot be reached")
            return
        if gone is not None:
            self._end(f"process {gone} has given no sign of life for {MISSED * INTERVAL:.0f} seconds")

    def _end(self, reason: str) -> None:
        print(f"cap-hf {self.command}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)
