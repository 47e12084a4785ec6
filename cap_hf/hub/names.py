"""Names from elsewhere, taken as text: on one line, with what Markdown, HTML or YAML would act on made harmless."""

import html
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def hub_id(name: str | None) -> str | None:
    """Return a name if it can be a repository on the Hub and is no folder here, else None."""
    if not name or "/" not in name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def short_name(name: str | None) -> str | None:
    """Return a Hub id as it is, and of a folder only its own name, not where it lies."""
    return name and (hub_id(name) or one_line(Path(name).name or name))


def one_line(value: Any) -> str:
    """Return text without line breaks and control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def text(value: Any) -> str:
    """Return text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_{}\[\]()!|~$])", r"\\\1", html.escape(one_line(value), quote=False))


def code(value: str | None) -> str | None:
    """Return text that cannot end the code block it stands in."""
    return value and value.replace("`", "'")


def link(name: str | None) -> str | None:
    """Return Markdown of a model's name: a link to the Hub, or a folder's own name."""
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{found})" if found else name and text(short_name(name))
