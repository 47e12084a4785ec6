"""The one exception that a user's mistake raises, and one line out of anybody else's."""

# Characters of a foreign message that are worth a line.
LONGEST_REASON = 400


class CAPError(ValueError):
    """Something the user can mend: the message names the thing and what to change, in one line."""


def reason(error: BaseException) -> str:
    """Return what an error says, on one line: all its lines, joined and shortened, or its type if it says nothing."""
    words = " ".join(str(error).split())
    if len(words) > LONGEST_REASON:
        words = f"{words[: LONGEST_REASON - 4]} ..."
    return words or type(error).__name__
