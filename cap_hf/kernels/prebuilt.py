"""Load the kernels that came compiled with the package, where it was installed from a wheel.

A library that somebody else could have written is not loaded. Who could have written this module is trusted already:
it runs with the same rights.
"""

import errno
import logging
import os
import platform
import stat
from pathlib import Path

import torch

from cap_hf.errors import reason
from cap_hf.kernels import libraries
from cap_hf.notices import warn_once

logger = logging.getLogger(__name__)


def load(name: str) -> bool:
    """Load the operators of an extension as `torch.ops.cap_hf.*` if the package brought them; return whether it did.

    A library that is there and cannot be loaded is one warning.
    """
    library = choose(name, set(processor().split()))
    if library is None:
        return False
    try:
        check_writers(library)
        torch.ops.load_library(library)
    except OSError as error:
        warn_once(
            logger, f"The C++ kernel {name} that came with cap_hf cannot be loaded, it is compiled: {reason(error)}"
        )
        return False
    return True


def choose(name: str, instructions: set[str], machine: str | None = None) -> Path | None:
    """Return the library of an extension for the best level that a processor with these instructions has, if any."""
    known = libraries.levels(name, machine or platform.machine())
    suited = [level for level, needed in known.items() if needed <= instructions]
    files = [libraries.FOLDER / libraries.file_name(name, level) for level in [*suited, ""]]
    return next((file for file in files if file.exists()), None)


def check_writers(library: Path) -> None:
    """Raise a PermissionError if somebody could have written a library, or put it there, who could not write this file.

    Raises:
        OSError: the library or its folder is not there.
    """
    own = os.stat(__file__)
    # An installer may link files to its own store: then who may write there is asked too.
    for path in {library, library.parent, library.resolve().parent}:
        status = path.stat()
        if status.st_uid not in (own.st_uid, os.geteuid(), 0):
            raise PermissionError(errno.EPERM, "it belongs to another user than cap_hf does")
        wider = status.st_mode & ~own.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if wider or (status.st_mode & stat.S_IWGRP and status.st_gid != own.st_gid):
            raise PermissionError(errno.EPERM, "others may write to it")


def processor() -> str:
    """Return what tells processors with other instructions apart: several machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
