"""Write folders and files so that a final name never holds half of one.

What is written lies in a folder of its own beside the final name, `.name.<unique>.partial`, in which a lock is held for
as long as the process that writes lives. Several runs can therefore write to one name at the same time: each publishes
what it wrote, whole, and the last one stays. A partial folder without a holder is what a killed run left: it is removed
by the next run that writes to the name.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from cap_hf.errors import CAPError

# In a partial folder: its lock, what is being written, and the folder that it takes the place of.
LOCK, NEW, OLD = "lock", "new", "old"


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; once it is whole it takes the name `path`, and another folder's place there.

    Raises:
        CAPError: the disk is full, or the folder cannot be written; nothing is changed then.
    """
    path = _real_path(path)
    if path.exists() and not path.is_dir():
        raise CAPError(f"{path} is a file: choose another name for the folder")
    with _partial_folder(path) as partial:
        folder = partial / NEW / path.name
        folder.mkdir(parents=True)
        yield folder
        _publish_directory(folder, path, partial)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to; once it is whole the file takes the name `path`, and another file's place there.

    The path has the name of the final one and is nobody else's. The folder of the final one is made if it is not there.

    Raises:
        CAPError: the disk is full, or the file cannot be written; nothing is changed then.
    """
    path = _real_path(path)
    with _partial_folder(path) as partial:
        file = partial / NEW / path.name
        file.parent.mkdir()
        yield file
        os.replace(file, path)


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file in one step: a reader sees the old content or the new, never a part.

    Raises:
        CAPError: the disk is full, or the file cannot be written.
    """
    with atomic_file(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _real_path(path: str | Path) -> Path:
    """Return where a link leads, so that what it names is replaced and not the link; another path as it is."""
    return Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` that holds this process's lock, and remove it in the end.

    Raises:
        CAPError: in place of any error of the system, also of one in the body.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        with open(partial / f"{LOCK}.new", "w") as lock:
            _try_lock(lock.fileno())
            # A lock without a holder is never seen under the name that `_remove_stale` looks for.
            os.rename(lock.name, partial / LOCK)
            yield partial
    except (OSError, SafetensorError) as error:
        raise _user_error(path, error) from error
    finally:
        if partial is not None:
            _give_back(partial, path)
            shutil.rmtree(partial, ignore_errors=True)


def _publish_directory(folder: Path, path: Path, partial: Path) -> None:
    """Give a folder the name `path`; what has the name moves into the partial folder.

    There is no call that exchanges two folders on every system, so for a moment nothing has the name.
    """
    while True:
        taken = not _rename(folder, path)
        # What was replaced goes at once; another run may take the name at any time, and is replaced in its turn.
        shutil.rmtree(partial / OLD, ignore_errors=True)
        if not taken:
            return
        with suppress(FileNotFoundError):
            os.rename(path, partial / OLD)


def _give_back(partial: Path, path: Path) -> None:
    """Put the folder that was moved away back if nothing took its place: a kill or Ctrl-C fell between two renames."""
    if (partial / OLD).exists() and not path.exists():
        _rename(partial / OLD, path)


def _rename(folder: Path, path: Path) -> bool:
    """Rename a folder; return False if another one that is not empty has the name."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _remove_stale(path: Path) -> None:
    """Remove the partial folders of `path` that killed runs left; those of runs that are alive are locked."""
    prefix, suffix = f".{path.name}.", ".partial"
    for name in os.listdir(path.parent):
        if not (name.startswith(prefix) and name.endswith(suffix)):
            continue
        stale = path.with_name(name)
        try:
            with open(stale / LOCK, "r+") as lock:
                if _try_lock(lock.fileno()):
                    _give_back(stale, path)
                    shutil.rmtree(stale, ignore_errors=True)
        except OSError:  # another run removed it, or may be about to fill it
            continue


def _try_lock(descriptor: int) -> bool:
    """Return whether this process has the lock of an open file now; never where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _user_error(path: Path, error: OSError | SafetensorError) -> CAPError:
    # safetensors wraps the system's error into a text.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return CAPError(f"the disk of {path} is full: free some space or choose another --output_dir")
    return CAPError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
