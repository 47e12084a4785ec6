"""The Accelerator of a command: it waits as long as another process may compute on its own."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

# How long one process waits for another in a collective. An elimination takes hours without any, and may take twice as
# long on one machine as on the next; NCCL's default ends a healthy run after 10 minutes. That a process is gone is
# noticed long before, by its silence (see heartbeat.py); this limit is for one that lives and will never arrive.
TIMEOUT = timedelta(days=1)


def make_accelerator() -> Accelerator:
    """Return the Accelerator of this process, connected to the others where a launcher has started several.

    A Trainer makes its own: pass it `ddp_timeout=int(TIMEOUT.total_seconds())`.
    """
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
