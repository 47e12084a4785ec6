"""What the name of a checkpoint can mean. Imports nothing heavy, so that a wrong path is found at once."""

import os
import re

from cap_hf.errors import CAPError

# What the Hub takes for a repository: name or user/name, neither of which begins or ends with '-' or '.'.
HUB_ID = re.compile(r"(\b[\w.-]+\b/)?\b[\w.-]{1,96}\b", re.ASCII)


def check_location(name_or_path: str) -> None:
    """Raise a CAPError if a name is neither a folder that is there nor one that a Hub repository can have.

    Without this an absolute path, ./x, ~/x, a/b/c or a\\b would be asked for on the Hub, and the answer would be about
    the characters of its name.
    """
    if os.path.isdir(name_or_path):
        return
    if os.path.exists(name_or_path):
        raise CAPError(f"{name_or_path} is a file: name the folder of the checkpoint")
    if not HUB_ID.fullmatch(name_or_path):
        raise CAPError(f"there is no folder {name_or_path!r}, and no Hub id has this form")
