"""Folders that do not outlive the process, even one that is ended in the middle of its work."""

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from cap_hf.errors import CAPError, reason

# Paths of folders that nobody needs once this process has ended.
_folders: set[str] = set()


class TemporaryFolder(tempfile.TemporaryDirectory):
    """A new folder that goes with `cleanup`, with its object, with the interpreter, or with `remove_temporary`.

    Args:
        dir: where it is made; the system's folder for such files if None.

    Attributes:
        name: its path.

    Raises:
        CAPError: it cannot be made.
    """

    def __init__(self, dir: str | Path | None = None) -> None:
        try:
            super().__init__(prefix="cap_hf-", dir=dir, ignore_cleanup_errors=True)
        except OSError as error:
            where = "the system's folder for temporary files" if dir is None else dir
            advice = "set TMPDIR to a folder that can be" if dir is None else "choose another folder"
            raise CAPError(f"{where} cannot be written ({reason(error)}): {advice}") from error
        register(self.name)
        weakref.finalize(self, forget, self.name)


def register(folder: str | Path) -> None:
    """Have a folder removed if the process is ended before `forget` is called."""
    _folders.add(str(folder))


def forget(folder: str | Path) -> None:
    """Leave a folder alone: it is gone, or has come to stay."""
    _folders.discard(str(folder))


def remove_temporary() -> None:
    """Remove every folder that is registered, from any thread, while other threads may still write to it."""
    for folder in list(_folders):
        doomed = f"{folder}.removed"
        with suppress(OSError):
            # A folder that is written to while it is emptied is not empty at the end. Nobody writes to a new name.
            os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
