"""Write folders and files so that a final name never holds half of one.

What is written lies in a folder of its own beside the final name, `.name.<unique>.partial`, in which a lock is held for
as long as the process that writes lives. Several runs can therefore write to one name at the same time: each publishes
what it wrote, whole, and the last one stays. A partial folder without a holder is what a killed run left: it is removed
by the next run that writes to the name.

A folder that cannot be exchanged itself - a mount point, the current folder, one whose parent may not be written - is
written from within: the partial folder lies in it, and what it holds is exchanged entry by entry.
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

from cap_hf.checkpoints.places import writing
from cap_hf.errors import CAPError

# In a partial folder: its lock, what is being written, and the folder that it takes the place of.
LOCK, NEW, OLD = "lock", "new", "old"
# In one that lies in the final folder: what is written is whole, and moves in.
READY = "ready"
# What the system says of a folder that has to stay where it is: it is a mount point, on another disk, or another's.
FIXED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
# What is no content of a disk: mkfs makes it.
LOST_AND_FOUND = "lost+found"


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; once it is whole it takes the name `path`, and another folder's place there.

    A link stays, and the folder that it leads to is replaced.

    Raises:
        CAPError: the disk is full, or the folder cannot be written; nothing is changed then.
    """
    path = real_path(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise CAPError(f"{path} is a file: choose another name for the folder")
    with _partial_folder(path) as partial:
        folder = partial / NEW / path.name
        folder.mkdir(parents=True)
        yield folder
        try:
            _publish_directory(folder, path, partial)
        except OSError as error:
            if error.errno not in FIXED or not os.path.isdir(path):
                raise
            # Tried, because nothing tells beforehand of a folder that is mounted from the same disk.
            with _partial_folder(path, inside=True) as inside:
                # To another disk this is a copy, so that only the next step says that it is whole.
                _exchange_content(Path(shutil.move(folder, inside / NEW)), path, inside)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to; once it is whole the file takes the name `path`, and another file's place there.

    The path has the name of the final one and is nobody else's. The folder of the final one is made if it is not there.

    Raises:
        CAPError: the disk is full, or the file cannot be written; nothing is changed then.
    """
    path = real_path(path)
    with _partial_folder(path, inside=False) as partial:
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


def real_path(path: str | Path) -> Path:
    """Return the absolute path that links lead to, there or not: what it names is replaced, and no link.

    Raises:
        CAPError: a link leads back to itself.
    """
    real = Path(os.path.realpath(path))
    loop = next((each for each in (real, *real.parents) if each.is_symlink()), None)
    if loop is not None:
        raise CAPError(f"{loop} is a link that leads back to itself: remove it, or choose another folder")
    return real


def is_empty(folder: Path, but: Path | None = None) -> bool:
    """Return whether a folder that is there holds nothing but one path; what mkfs puts onto a new disk is nothing.

    Raises:
        CAPError: it may not be looked into.
    """
    with writing(folder):
        return all(name == LOST_AND_FOUND or folder / name == but for name in os.listdir(folder))


def is_fixed(folder: Path) -> bool:
    """Return whether a folder has to stay where it is: a mount point, or what the current folder lies in."""
    return folder.is_dir() and (os.path.ismount(folder) or Path(os.path.realpath(".")).is_relative_to(folder))


@contextmanager
def _partial_folder(path: Path, inside: bool | None = None) -> Iterator[Path]:
    """Yield a folder that holds this process's lock, and remove it in the end.

    Args:
        path: that is written to.
        inside: whether the folder lies in `path`, and not beside it; None to choose what can be done.

    Raises:
        CAPError: in place of any error of the system, also of one in the body.
    """
    with writing(path):
        if inside is None:
            inside = is_fixed(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        partial = _make_partial(path, inside)
        try:
            with open(partial / f"{LOCK}.new", "w") as lock:
                _try_lock(lock.fileno())
                # A lock without a holder is never seen under the name that `_remove_stale` looks for.
                os.rename(lock.name, partial / LOCK)
                yield partial
        finally:
            _give_back(partial, path)
            shutil.rmtree(partial, ignore_errors=True)


def _make_partial(path: Path, inside: bool) -> Path:
    """Make a new partial folder in `path` or beside it; in it also where nothing can be made beside it."""
    try:
        folder = path if inside else path.parent
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=folder))
    except OSError as error:
        if inside or error.errno not in FIXED or not os.path.isdir(path):
            raise
    return _make_partial(path, inside=True)


def _publish_directory(folder: Path, path: Path, partial: Path) -> None:
    """Give a folder the name `path`; what has the name moves into the partial folder.

    There is no call that exchanges two folders on every system, so for a moment nothing has the name.
    """
    if partial.parent == path:
        _exchange_content(folder, path, partial)
        return
    while True:
        taken = not _rename(folder, path)
        # What was replaced goes at once; another run may take the name at any time, and is replaced in its turn.
        shutil.rmtree(partial / OLD, ignore_errors=True)
        if not taken:
            return
        with suppress(FileNotFoundError):
            os.rename(path, partial / OLD)


def _exchange_content(folder: Path, path: Path, partial: Path) -> None:
    """Move what `path` holds into the partial folder in it, and what another folder there holds in its place.

    A kill leaves what there was, or what is new, to be put right by `_give_back`.
    """
    (partial / OLD).mkdir()
    for name in _content(path):
        with suppress(FileNotFoundError):  # another run moved it
            os.rename(path / name, partial / OLD / name)
    os.rename(folder, partial / READY)
    _move_in(partial / READY, path)


def _move_in(folder: Path, path: Path) -> None:
    """Move what a folder holds into `path`."""
    for name in os.listdir(folder):
        while not _rename(folder / name, path / name):
            shutil.rmtree(path / name, ignore_errors=True)


def _content(path: Path) -> list[str]:
    """Return the names of what a folder holds, without partial folders of its own and what mkfs made."""
    return [name for name in os.listdir(path) if name != LOST_AND_FOUND and not _is_partial(name, path)]


def _is_partial(name: str, path: Path) -> bool:
    return name.startswith(f".{path.name}.") and name.endswith(".partial")


def _give_back(partial: Path, path: Path) -> None:
    """Put a final name right after a kill, an interrupt or an error between two renames.

    The folder that was moved away comes back if nothing took its place; what is whole and was moving in moves in.
    """
    if (partial / READY).exists():
        _move_in(partial / READY, path)
    elif (partial / OLD).exists() and partial.parent == path:
        _move_in(partial / OLD, path)
    elif (partial / OLD).exists() and not path.exists():
        _rename(partial / OLD, path)


def _rename(source: Path, path: Path) -> bool:
    """Rename a folder or file; return False if a folder that is not empty has the name."""
    try:
        os.rename(source, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _remove_stale(path: Path) -> None:
    """Remove the partial folders of `path` that killed runs left; those of runs that are alive are locked."""
    for folder in (path.parent, path):
        try:
            names = os.listdir(folder)
        except OSError:  # not there, a file, or one that may not be looked into
            continue
        for name in names:
            if _is_partial(name, path):
                _remove_if_stale(folder / name, path)


def _remove_if_stale(partial: Path, path: Path) -> None:
    """Remove a partial folder unless a run that is alive holds its lock, or it is nobody's."""
    with suppress(OSError), open(partial / LOCK, "r+") as lock:  # another run removed it, or may be about to fill it
        if _try_lock(lock.fileno()):
            _give_back(partial, path)
            shutil.rmtree(partial, ignore_errors=True)


def _try_lock(descriptor: int) -> bool:
    """Return whether this process has the lock of an open file now; never where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
