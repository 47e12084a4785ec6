"""Ends a process of a run with one line when another one is gone, whatever it is doing: never a hang."""

import os
import re
import select
import signal
import socket
import sys
import threading
from types import TracebackType
from typing import NoReturn

from cap_hf.distributed import heartbeat
from cap_hf.distributed.heartbeat import Heartbeat
from cap_hf.distributed.temporary import remove_temporary

# What gloo, NCCL and the store say of another process that has ended or does not answer. What else NCCL says is this
# process's own trouble, for example that its GPU is out of memory.
LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket closed|timed out waiting|wait timeout|"
    r"timeout caused pair closure|ncclRemoteError|remote process (exited|exiting)",
    re.IGNORECASE,
)
# Seconds that Ctrl-C gives the main thread to leave by itself.
PATIENCE = 5.0

_ending = threading.Lock()


def lost_peer(error: BaseException) -> bool:
    """Return whether an error is what a backend raises when another process is gone."""
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def end(code: int, line: str | None = None) -> NoReturn:
    """End this process at once, from any thread, with one line and without its temporary folders."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Never released: who comes second waits here for the end, and adds no line.
    _ending.acquire()
    if line is not None:
        print(line, file=sys.stderr, flush=True)
    remove_temporary()
    os._exit(code)


class Watch:
    """Watches the other processes from a thread while the main one works, or waits in a collective.

    It reacts to the launcher's signal to end, which Python's own handlers would only see after the collective, and
    to a process that gives no sign of life: killed on another machine, stopped, or cut off.

    Args:
        command: for the line that is printed.

    Raises:
        KeyError: no launcher has said which process this is.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.heartbeat = Heartbeat(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        self._finished = threading.Event()
        self._signals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="cap_hf watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._descriptor = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._leave_child)
        self._thread.start()
        self.heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The work is done: silence from here on means nothing, here and to the others.
        self._finished.set()
        self.heartbeat.finish()
        signal.set_wakeup_fd(self._descriptor)
        signal.signal(signal.SIGTERM, self._handler)
        self._wakeup.send(b"\0")
        self._thread.join()

    def _leave_child(self) -> None:
        """Let a forked child be ended by its signals, and say nothing of them here."""
        if not self._finished.is_set():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _run(self) -> None:
        while not self._finished.is_set():
            if not select.select([self._signals], [], [], heartbeat.INTERVAL)[0]:
                self._look()
                continue
            numbers = self._signals.recv(64)
            if signal.SIGTERM in numbers:
                self._end("told to end, because another process has ended or the launcher was stopped")
            if signal.SIGINT in numbers and not self._finished.wait(PATIENCE):
                self._end("interrupted", code=130)

    def _look(self) -> None:
        silent = self.heartbeat.look()
        if self.heartbeat.rank in silent:
            self._end("the launcher of the first machine has ended or cannot be reached")
        if silent:
            self._end(f"process {silent[0]} gives no sign of life: it has ended, was stopped or is cut off")

    def _end(self, reason: str, code: int = 1) -> None:
        if not self._finished.is_set():
            end(code, f"cap-hf {self.command}: {reason}")
