"""The one exception that a user's mistake raises."""


class CAPError(ValueError):
    """Something the user can mend: the message names the thing and what to change, in one line."""
