"""Write folders and files so that a final name never holds half of one."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from cap_hf.errors import CAPError


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A new folder to fill; it takes the name `path` (and another folder's place there) only once it is whole.

    Raises:
        CAPError: the disk is full, or the folder cannot be written; nothing is changed then.
    """
    path = Path(path)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if path.exists() and not path.is_dir():
        raise CAPError(f"{path} is a file: choose another name for the folder")
    try:
        if old.exists() and not path.exists():
            os.rename(old, path)  # a run was killed between the two renames below
        for stale in (partial, old):
            if stale.exists():
                shutil.rmtree(stale)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
    except (OSError, SafetensorError) as error:
        raise _user_error(path, error) from error
    finally:
        # Also after Ctrl-C: one of the two folders has the name.
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file in one step: a reader sees the old content or the new, never a part.

    Raises:
        CAPError: the disk is full, or the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise _user_error(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _user_error(path: Path, error: OSError | SafetensorError) -> CAPError:
    # safetensors wraps the system's error into a text.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return CAPError(f"the disk of {path} is full: free some space or choose another --output_dir")
    return CAPError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
