"""Write folders and files so that a final name never holds half of one.

What is written lies in a folder of its own beside the final name, `.name.<unique>.partial`, in which a lock is held for
as long as the process that writes lives. Several runs can therefore write to one name at the same time: each publishes
what it wrote, whole, and the last one stays. A partial folder without a holder is what a killed run left: it is removed
by the next run that writes to the name.

A folder that cannot be exchanged itself - a mount point, the current folder, one whose parent may not be written - is
written from within: the partial folder lies in it, and what it holds is exchanged entry by entry. One run at a time
does so, with a lock on the folder, and first puts right what a killed one has left: what lies there is never of two.

What is replaced is nothing but a checkpoint, see `cap_hf.checkpoints.replacing`.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from cap_hf.checkpoints.places import real_path, writing
from cap_hf.checkpoints.replacing import check_replaceable, has_to_stay, is_partial, stays
from cap_hf.errors import CAPError

# In a partial folder: its lock, what is being written, and the folder that it takes the place of.
LOCK, NEW, OLD = "lock", "new", "old"
# In one that lies in the final folder: what is written is whole, and moves in.
READY = "ready"
# What the system says of a folder that has to stay where it is: it is a mount point, on another disk, or another's.
FIXED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
# Seconds between two looks at a lock that another run holds, and how many: entries are exchanged in less than one.
PAUSE, LOOKS = 0.05, 1200


@contextmanager
def atomic_directory(path: str | Path, source: str | Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; once it is whole it takes the name `path`, and another checkpoint's place there.

    A link stays, and the folder that it leads to is replaced.

    Args:
        path: of the folder.
        source: a checkpoint that is copied into it, whose own place it does not take.

    Raises:
        CAPError: something else than a checkpoint would be lost (see `check_replaceable`), the disk is full, or the
            folder cannot be written; nothing is changed then.
    """
    path = real_path(path)
    check_place(path, source)
    with _partial_folder(path) as partial:
        folder = partial / NEW / path.name
        folder.mkdir(parents=True)
        yield folder
        try:
            published = _publish_directory(folder, path, partial, source)
        except OSError as error:
            if error.errno not in FIXED or not os.path.isdir(path):
                raise
            # Tried, because nothing tells beforehand of a folder that is mounted from the same disk.
            published = False
        if not published:
            with _partial_folder(path, inside=True) as inside:
                # To another disk this is a copy, so that only the next step says that it is whole.
                _exchange_content(Path(shutil.move(folder, inside / NEW)), path, inside, source)


def check_place(path: str | Path, source: str | Path | None = None) -> None:
    """Raise the CAPError that `atomic_directory` would, if `path` is a file or something there would be lost."""
    path = real_path(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise CAPError(f"{path} is a file: choose another name for the folder")
    # Not of what is half exchanged; a folder that is not there, or just taken away, may be written.
    with writing(path), suppress(FileNotFoundError), _alone_in(path):
        check_replaceable(path, source)


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
        _remove_stale(path)
        if inside is None:
            inside = has_to_stay(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _make_partial(path, inside)
        try:
            with open(partial / f"{LOCK}.new", "w") as lock:
                _lock(lock.fileno())
                # A lock without a holder is never seen under the name that `_remove_stale` looks for.
                os.rename(lock.name, partial / LOCK)
                yield partial
        finally:
            _end(partial, path)


def _make_partial(path: Path, inside: bool) -> Path:
    """Make a new partial folder in `path` or beside it; in it also where nothing can be made beside it."""
    try:
        # Nobody takes a folder away for something new that is about to be written in it.
        with _alone_in(path) if inside else nullcontext():
            folder = path if inside else path.parent
            return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=folder))
    except OSError as error:
        if inside or error.errno not in FIXED or not os.path.isdir(path):
            raise
    return _make_partial(path, inside=True)


def _publish_directory(folder: Path, path: Path, partial: Path, source: str | Path | None) -> bool:
    """Give a folder the name `path`; what has the name moves into the partial folder.

    There is no call that exchanges two folders on every system, so for a moment nothing has the name.

    Returns:
        Whether it was done; not where the folder that has the name has to stay, as it had not when the run began.
    """
    if partial.parent == path:
        _exchange_content(folder, path, partial, source)
        return True
    while True:
        taken = not _rename(folder, path)
        # What was replaced goes at once; another run may take the name at any time, and is replaced in its turn.
        shutil.rmtree(partial / OLD, ignore_errors=True)
        if not taken:
            return True
        with suppress(FileNotFoundError), _alone_in(path):
            # Again, since something may have been put there while the new was made.
            check_replaceable(path, source)
            if has_to_stay(path):
                return False
            os.rename(path, partial / OLD)


def _exchange_content(folder: Path, path: Path, partial: Path, source: str | Path | None) -> None:
    """Move what `path` holds into the partial folder in it, and what another folder there holds in its place.

    A kill leaves what there was, or what is new, to be put right by `_give_back`.
    """
    with _alone_in(path):
        check_replaceable(path, source)
        try:
            (partial / OLD).mkdir()
            for name in os.listdir(path):
                if not stays(name, path):
                    os.rename(path / name, partial / OLD / name)
            os.rename(folder, partial / READY)
            _move_in(partial / READY, path)
        except BaseException:
            _give_back(partial, path)
            raise


@contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    """Hold the lock on a folder, in which no other run exchanges anything then, and nothing is half exchanged.

    Raises:
        CAPError: another run does not give it back.
        FileNotFoundError: the folder is not there.
    """
    for _ in range(LOOKS):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # While this waited, another folder may have taken the name.
            if _lock(descriptor) is not False and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _remove_stale_in(path, path)
                yield
                return
        finally:
            os.close(descriptor)
        time.sleep(PAUSE)
    raise CAPError(f"another run is writing to {path}: wait for it, or choose another folder")


def _move_in(folder: Path, path: Path) -> None:
    """Move what a folder holds into `path`."""
    for name in os.listdir(folder):
        while not _rename(folder / name, path / name):
            shutil.rmtree(path / name, ignore_errors=True)


def _moving(partial: Path) -> Path | None:
    """Return the folder of a partial one, in the final folder, that holds what has still to move there, or None."""
    moving = partial / (READY if (partial / READY).exists() else OLD)
    return moving if moving.exists() and os.listdir(moving) else None


def _give_back(partial: Path, path: Path) -> None:
    """Put a final name right after a kill, an interrupt or an error between two renames.

    The folder that was moved away comes back if nothing took its place; what is whole and was moving in moves in. Where
    that is done in `path`, the lock on it is held.
    """
    if partial.parent == path:
        if moving := _moving(partial):
            _move_in(moving, path)
    elif (partial / OLD).exists() and not path.exists():
        # Not in the place of what another run puts there at this moment.
        _rename(partial / OLD, path)


def _end(partial: Path, path: Path) -> None:
    """Remove a partial folder of this run, unless something in it has still to move: then the next run does it."""
    if partial.parent != path:
        _give_back(partial, path)
    elif _moving(partial):
        return
    shutil.rmtree(partial, ignore_errors=True)


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
    _remove_stale_in(path.parent, path)
    if _partials(path, path):
        with suppress(FileNotFoundError), _alone_in(path):
            pass  # done on the way


def _remove_stale_in(folder: Path, path: Path) -> None:
    for partial in _partials(folder, path):
        # Another run removed it, or may be about to fill it.
        with suppress(OSError), open(partial / LOCK, "r+") as lock:
            if _lock(lock.fileno()):
                _give_back(partial, path)
                shutil.rmtree(partial, ignore_errors=True)


def _partials(folder: Path, path: Path) -> list[Path]:
    """Return the partial folders of `path` in a folder; none if it is not there, or may not be looked into."""
    with suppress(OSError):
        return [folder / name for name in os.listdir(folder) if is_partial(name, path)]
    return []


def _lock(descriptor: int) -> bool | None:
    """Return whether this process has the lock of an open file or folder now; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
