"""What the name of a checkpoint can mean. Imports nothing heavy, so that a wrong path is found at once."""

import os
import re

from cap_hf.errors import CAPError

# What the Hub takes for a repository: name or user/name, neither of which begins or ends with '-' or '.'.
HUB_ID = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)


def check_name(name: object, what: str) -> None:
    """Raise a CAPError if what is given for the name of something is no name.

    Args:
        name: a str or a Path.
        what: it should name.
    """
    if not isinstance(name, str | os.PathLike):
        raise CAPError(f"{name!r:.80} is no name of {what}, but of type {type(name).__name__}: pass a str or a Path")


def check_location(name_or_path: str | os.PathLike) -> None:
    """Raise a CAPError if a name is neither a folder that is there nor one that a Hub repository can have.

    Without this an absolute path, ./x, ~/x, a/b/c or a\\b would be asked for on the Hub, and the answer would be about
    the characters of its name.
    """
    check_name(name_or_path, "a checkpoint, a folder or a Hub id")
    if os.path.isdir(name_or_path):
        return
    if os.path.exists(name_or_path):
        raise CAPError(f"{name_or_path} is a file: name the folder of the checkpoint")
    if not HUB_ID.fullmatch(os.fspath(name_or_path)):
        raise CAPError(f"there is no folder {str(name_or_path)!r}, and no Hub id has this form")
