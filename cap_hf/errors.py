"""The one exception that a user's mistake raises, and one line out of anybody else's."""

import errno
import re

# Characters of a foreign message that are worth a line; of a longer one the beginning and the end are shown.
LONGEST_REASON = 400
# What PyTorch puts before an error of a DataLoader's worker, and Python before every error.
IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.")
RAISED = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)(?:: |$)", re.MULTILINE)

# What PyTorch says on a CPU where there is no more memory.
NO_ROOM = "can't allocate memory"


class CAPError(ValueError):
    """Something the user can mend: the message names the thing and what to change, in one line."""


class ModelFailure(CAPError):
    """What a model's own code or a hook on it raised: of its images, or a mistake that only a traceback shows."""


def reason(error: BaseException) -> str:
    """Return what an error says, on one line: all its lines, joined and shortened, or its type if it says nothing.

    From a worker of a DataLoader the message comes after the traceback in that process.
    """
    words = " ".join(own_words(str(error)).split())
    if len(words) > LONGEST_REASON:
        half = (LONGEST_REASON - 5) // 2
        words = f"{words[:half]} ... {words[-half:]}"
    if isinstance(error, KeyError) and words:
        return f"there is no {words}"
    return words or type(error).__name__


def own_words(text: str) -> str:
    """Return what an error in a worker of a DataLoader says; any other text as it is."""
    if not IN_WORKER.match(text):
        return text
    raised = list(RAISED.finditer(text))
    return text[raised[-1].end() :] if raised else text


def foreign_line(error: Exception) -> str:
    """Return one line about an error of another library, with what to do where that is known.

    Args:
        error: no CAPError.
    """
    number, said = getattr(error, "errno", None), reason(error)
    place = getattr(error, "filename", None)
    if isinstance(error, MemoryError) or "out of memory" in said or "not enough memory" in said or NO_ROOM in said:
        return f"there is too little memory ({said}): use smaller batches, or a machine with more"
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in said:
        return f"a disk is full ({place or said}): free some space there"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place or 'a file'} cannot be opened or written ({said}): look at whose it is, or name another place"
    if isinstance(error, ImportError):
        return f"a package is missing or broken: {said}"
    return f"{type(error).__name__}: {said}"


def readable(size: float) -> str:
    """Return a number of bytes as `1.5 GB`, `23.0 MB`, `4.1 kB` or `96 bytes`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # A tenth of a unit is said in it: below that the next smaller one has more digits.
        if size >= scale / 10:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"
