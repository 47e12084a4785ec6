"""How a run is watched: the page that it ends with, the trackers that it tells; checked before anything is loaded."""

import re
import shlex
from collections.abc import Sequence

from cap_hf.errors import CAPError
from cap_hf.extras import check

# Trackers by the package that each needs; an extra of cap_hf has the same name.
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
NO_TRACKER = "none"
# What follows one of these names is never shown, nor is what looks like a token of the Hub.
SECRET = re.compile(r"--[\w-]*token(=|$)", re.IGNORECASE)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


def check_report(report: bool) -> None:
    """Raise a CAPError if a page is to be made and what draws it is not installed."""
    if report:
        check("vl_convert", "report")


def check_trackers(names: Sequence[str]) -> list[str]:
    """Return the trackers that are meant, each once.

    Args:
        names: as `--report_to` has them.

    Raises:
        CAPError: one is not known or not installed, or `none` stands beside another one.
    """
    wanted = list(dict.fromkeys(names))
    if wanted == [NO_TRACKER]:
        return []
    for name in wanted:
        if name == NO_TRACKER:
            raise CAPError(f"--report_to {' '.join(wanted)}: {NO_TRACKER} stands alone")
        if name not in TRACKERS:
            raise CAPError(f"--report_to {name}: the trackers are {', '.join(TRACKERS)}, and {NO_TRACKER}")
        check(TRACKERS[name], name)
    return wanted


def as_typed(command: str, argv: Sequence[str], secrets: Sequence[str | None] = ()) -> str:
    """Return a command as it was typed, with stars in the place of tokens.

    Args:
        command: its name.
        argv: what follows.
        secrets: tokens as they were understood, which are hidden wherever they stand and however they were named.
    """
    words, hide = ["cap-hf", command], False
    # The longest first: a part of one must not be left.
    tokens = sorted({each for each in secrets if each}, key=len, reverse=True)
    for word in argv:
        name = word
        for token in tokens:
            word = word.replace(token, "***")
        if hide:
            words.append("***")
        elif SECRET.match(name) and "=" in name:
            words.append(f"{name.partition('=')[0]}=***")
        else:
            words.append(TOKEN.sub("***", word))
        hide = not hide and SECRET.fullmatch(name) is not None
    return shlex.join(words)
