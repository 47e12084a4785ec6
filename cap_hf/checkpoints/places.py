"""Say in one line which place was full or closed when something could not be written: often it is not the output."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cap_hf.errors import CAPError, readable, reason

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
# What a disk with less than this cannot take is not worth a second look.
FULL_BYTES = 2**20
# How cap_hf and Python's own tempfile call what they make in the system's folder for temporary files.
TEMPORARY = re.compile(r"cap_hf-.*|tmp[a-z0-9_]{8}.*")


@contextmanager
def writing(place: str | Path) -> Iterator[None]:
    """Inside the context files are written below a place; what the system says against it becomes one line.

    Raises:
        CAPError: in place of an error of the system, of safetensors, or of PyTorch's writer. It names the place, or
            another one where the error is about that.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise write_error(place, error) from error
    except RuntimeError as error:
        # What torch.save says of a disk that is full, whatever the reason.
        if "PytorchStreamWriter" not in str(error):
            raise
        raise write_error(place, error) from error


def write_error(place: str | Path, error: Exception) -> CAPError:
    """Return one line about what could not be written, or read meanwhile.

    Args:
        place: what was being written.
        error: what a library said; safetensors and PyTorch wrap the system's error into a text.
    """
    named, number = getattr(error, "filename", None), getattr(error, "errno", None)
    is_full = number in FULL or any(os.strerror(each) in str(error) for each in FULL)
    if is_full:
        # Of a copy the first file is the one that is read.
        named = getattr(error, "filename2", None) or named
    said = getattr(error, "strerror", None) or reason(error)
    where = Path(place)
    if isinstance(named, (str, bytes)):
        if not is_about(named := os.fsdecode(named), where):
            where = Path(named)
            if not is_full:
                return CAPError(f"{where} cannot be read or written ({said}): {advice(where)}")
    elif isinstance(error, OSError) and number is None:
        # A library's own words, about no file.
        return CAPError(reason(error))
    elif is_full:
        where = full_place(where)
    if is_full:
        return CAPError(f"the disk of {where} is full: free some space, or {advice(where)}")
    return CAPError(f"cannot write {where} ({said}): {advice(where)}")


def closed_cache(error: BaseException, cache_dir: str | None = None) -> CAPError | None:
    """Return one line about the cache of Hugging Face if an error is one of writing to it, else None.

    Args:
        error: what was raised while something was downloaded.
        cache_dir: where to, as it was asked for; None for the usual cache.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    cache = Path(os.path.abspath(cache_dir or cache_places()[1]))
    for each in chain:
        if not isinstance(each, OSError) or each.errno not in (*FULL, *CLOSED):
            continue
        named = each.filename if isinstance(each.filename, str) else None
        if named is None and each.errno not in FULL:
            continue
        # What is full or closed may be a folder that the cache was to be made in.
        if named is None or is_about(named, cache):
            where, what = named or cache, "--cache_dir" if cache_dir else "HF_HOME"
            return CAPError(
                f"the cache of downloads, {where}, cannot be written ({each.strerror}): name another with {what}"
            )
    return None


def is_about(named: str, place: Path) -> bool:
    """Return whether a file that an error names belongs to a place, to what will become it, or to the way there."""
    path, place = Path(os.path.abspath(named)), Path(os.path.abspath(place))
    if place.is_relative_to(path) or path.is_relative_to(place):
        return True
    below = path.relative_to(place.parent).parts[:1] if path.is_relative_to(place.parent) else ()
    return any(part.startswith(f".{place.name}.") and part.endswith(".partial") for part in below)


def full_place(place: Path) -> Path:
    """Return the system's folder for temporary files if its disk is the full one, else the place."""
    temporary = temporary_root()
    if temporary is None or free_bytes(temporary) >= FULL_BYTES or free_bytes(place) < FULL_BYTES:
        return place
    return temporary


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


def check_space(place: Path, needed: int) -> None:
    """Raise a CAPError if the disk of a place, which need not be there yet, has fewer bytes free than are needed."""
    if needed > (free := free_bytes(place)):
        raise CAPError(
            f"{place} needs {readable(needed)}, and its disk has {readable(free)} free: free some space, or "
            f"{advice(place)}"
        )


def free_bytes(place: Path) -> int:
    """Return what is free on the disk of a place that need not be there yet."""
    existing = next(path for path in (place.absolute(), *place.absolute().parents) if os.path.exists(path))
    return shutil.disk_usage(existing).free


def advice(where: Path) -> str:
    """Return how to have something written elsewhere."""
    where, temporary = Path(os.path.abspath(where)), temporary_root()
    if temporary is not None and where.is_relative_to(temporary):
        below = where.relative_to(temporary).parts
        if not below or TEMPORARY.fullmatch(below[0]):
            return "set TMPDIR to a folder on another disk"
    if where.is_relative_to(os.path.abspath(cache_places()[0])):
        return "set HF_HOME to a folder on another disk"
    return "choose another folder"


def cache_places() -> tuple[str, str]:
    """Return the folder of all that Hugging Face's libraries keep, and that of what is downloaded from the Hub."""
    # Imported here: it takes longer than the line about a wrong output folder should.
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    return HF_HOME, HF_HUB_CACHE


def temporary_root() -> Path | None:
    """Return the system's folder for temporary files, or None if there is none that can be written."""
    try:
        return Path(os.path.abspath(tempfile.gettempdir()))
    except FileNotFoundError:
        return None
