"""How much memory and disk there is to plan with."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from cap_hf.collection.resources import Resources
from cap_hf.distributed.processes import processes_here
from cap_hf.errors import CAPError, readable, reason

# Of the memory that is free, what is planned with: allocators and other programs need some.
HEAD_ROOM = 0.85
# Written to the disk to see how fast it is.
TRIAL_BYTES = 32 * 2**20


def available_bytes(resources: Resources, device: torch.device) -> int:
    """Return how many bytes more this process may take: of the device, or of the machine for a CPU."""
    if device.type == "cpu":
        used = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available // processes_here()
    else:
        memory = torch.get_device_module(device)
        used = memory.memory_allocated(device)
        free = memory.mem_get_info(device)[0] + memory.memory_reserved(device) - used
    free = int(free * HEAD_ROOM)
    return free if resources.bytes is None else min(free, resources.bytes - used)


def check_disk(spilled: int, passes: int, resources: Resources) -> None:
    """Raise a CAPError if the disk has no room for what every process on this machine spills."""
    if not spilled:
        return
    folder = spill_folder(resources)
    needed = spilled * processes_here()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CAPError(
            f"{passes} passes keep {readable(needed)} in {folder}, where {readable(free)} are free: name another "
            "folder with --spill_dir, or take a smaller --fisher_block_size"
        )


def disk_seconds(folder: Path) -> float:
    """Return the seconds that writing a byte to a folder's disk takes, from a short trial.

    Raises:
        CAPError: the folder cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - start) / TRIAL_BYTES
    except OSError as error:
        raise CAPError(f"{folder} cannot be written ({reason(error)}): name another folder with --spill_dir") from error


@contextmanager
def unmade(resources: Resources) -> Iterator[None]:
    """Take away what `spill_folder` has made meanwhile, where nothing has come into it."""
    folder = Path(resources.spill_dir or ".")
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for each in missing:
                each.rmdir()


def spill_folder(resources: Resources) -> Path:
    """Return the folder for what goes to the disk.

    Raises:
        CAPError: it cannot be made, or none is named and the system has none.
    """
    try:
        folder = Path(resources.spill_dir or tempfile.gettempdir())
    except FileNotFoundError as error:
        raise CAPError(
            f"there is no folder for temporary files ({reason(error)}): set TMPDIR, or name one with --spill_dir"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CAPError(f"--spill_dir {folder} cannot be made: {reason(error)}") from error
    return folder
