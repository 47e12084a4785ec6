"""Keep compiled libraries between runs, and take none that somebody else could have written.

A library is loaded with all rights of the user, and its name can be guessed. So the folder and the file must belong to
this user or to root and be writable by nobody else. Both are judged through the descriptors that they are read from:
what is exchanged after the check is not what is read.
"""

import errno
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cap_hf.notices import warn_once

logger = logging.getLogger(__name__)

# Where compiled kernels are kept; default: cap_hf in the user's cache folder.
CACHE_VARIABLE = "CAP_HF_CACHE"


def cache_folder() -> Path:
    """Return the folder that compiled kernels are kept in; it need not exist."""
    # A user in a container may have no home, which Path.home() would not take.
    base = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "cap_hf")


def take(library: Path) -> bytes | None:
    """Return the bytes of a library in the cache, or None if there is none that can be trusted; a warning says why."""
    try:
        with open_folder(library.parent) as folder:
            return read(folder, library.name)
    except FileNotFoundError:
        return None
    except OSError as error:
        warn_once(logger, describe(library.parent, error))
        return None


def keep(library: Path, content: bytes) -> None:
    """Put a library into the cache in one step, in the place of what has its name; a warning where that is impossible.

    The folder is made for this user alone if it is not there.
    """
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_folder(library.parent) as folder:
            write(folder, library.name, content)
    except OSError as error:
        warn_once(logger, describe(library.parent, error))


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Give the descriptor of a folder that only this user and root can write to.

    Raises:
        OSError: it is not there, cannot be opened, or others could have written to it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        check_owner(os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def read(folder: int, name: str) -> bytes | None:
    """Return the bytes of a file in an open folder, or None if it is not there or a warning says what is wrong with it.

    A link is not followed.
    """
    try:
        # Without O_NONBLOCK a named pipe in the file's place would hold this process for ever.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PermissionError(errno.EPERM, "it is not a regular file")
            check_owner(status)
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        fault = "it is a link" if error.errno == errno.ELOOP else error.strerror
        warn_once(logger, f"The compiled kernel {name} in the cache is not used and is made anew: {fault}")
        return None


def write(folder: int, name: str, content: bytes) -> None:
    """Write a file of an open folder in one step; processes that write it at once do not meet.

    Raises:
        OSError: it cannot be written; nothing is left behind then.
    """
    partial = f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(partial, flags, 0o600, dir_fd=folder), "wb") as file:
        try:
            file.write(content)
            file.flush()
            os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial, dir_fd=folder)
            raise


def check_owner(status: os.stat_result) -> None:
    """Raise a PermissionError if somebody other than this user and root owns a file or folder, or may write to it."""
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "others may write to it")


def describe(folder: Path, error: OSError) -> str:
    """Return the warning for a cache that cannot be used."""
    return (
        f"Compiled kernels cannot be kept in {folder} ({error.strerror}): they are compiled anew each time. "
        f"Make that folder yours alone (chmod 700), or set {CACHE_VARIABLE} to another one"
    )
