"""The Accelerator of a command: it waits as long as another process may compute on its own."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

# How long one process waits for another in a collective. An elimination takes hours without any, and may take twice as
# long on one machine as on the next; NCCL's default ends a healthy run after 10 minutes. That a process is gone is
# noticed long before, by its silence (see heartbeat.py); this limit is for one that lives and will never arrive.
TIMEOUT = timedelta(days=1)


def make_accelerator(trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """Return the Accelerator of this process, connected to the others where a launcher has started several.

    A Trainer makes its own: pass it `ddp_timeout=int(TIMEOUT.total_seconds())`.

    Args:
        trackers: that it logs to once they are begun with its `init_trackers`.
        folder: for those that write files.
    """
    handlers = [InitProcessGroupKwargs(timeout=TIMEOUT)]
    return Accelerator(kwargs_handlers=handlers, log_with=list(trackers) or None, project_dir=folder)
