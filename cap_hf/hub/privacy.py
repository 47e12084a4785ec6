r"""What a published file says of the machine that it was made on: nothing.

Files here may say so; what is published has short names in the place of paths: their last parts, as the card has them.
How closely a text is looked at depends on where it stands:

- what a library goes by (names of weights, classes, code, labels, tokens, a tokenizer) is left as it is;
- of any other text a path is shortened that it is as a whole (`/a/b`, `C:\a`, `\\host\a`, `~/a`, `file:///a`), and one
  that begins with a folder of this machine, or has the user's name as a part;
- in a report, and where a file says where something comes from, so is every absolute path within a text, and the name
  of the host is replaced.

Hub tokens are taken out of all of them.
"""

import getpass
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from cap_hf.checkpoints.folder import COMPANIONS, REPORT_NAME, read_json
from cap_hf.hub.names import hub_id

# All that lies beside a model and is no processor's is a tokenizer's.
TOKENIZERS = frozenset(COMPANIONS) - {"processor_config.json"}
# Keys of what libraries go by, cap_hf among them, with all that is below them.
TECHNICAL = re.compile(
    r"label|class|token(?!iz)|architecture|pattern|auto_map|model_type|weight_map|quantization_config"
    r"|^(config|include|exclude|layers|left_alone|recalibrated_batch_norm)$"
)
# Keys of where something comes from; a file may also be one beside the weights, whose name stays.
ORIGIN = re.compile(r"(^|_)(path|dir)s?$|^(base_model|dataset|dataset_name)$")
FILE = re.compile(r"(^|_)files?$")
# What stands in place of a path that ends with the user's name, of the host's name, of a token.
FOLDER, HOST, TOKEN = "folder", "host", "token"

TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
# How the Trainer calls a folder of logs, `runs/Jul05_12-00-00_host`, which could be a Hub id.
LOGS = re.compile(r"\d\d-\d\d-\d\d_")
# How a text begins that is a path as a whole, and what none has in it.
ABSOLUTE = re.compile(r"(file:)?/{1,3}[^/\s]|[A-Za-z]:[\\/][^\\/]|\\\\[^\\]|~[\w.-]*[\\/][^\\/]")
NOT_IN_PATHS = re.compile(r"[*?|<>\"\n]")
# An address of the web is no path.
ADDRESS = re.compile(r"((?!file:)[A-Za-z][\w+.-]+://[^/\s]\S*)")
# A part of a path within a text ends at what cannot be in a name without quotes; at a blank too if it is the last.
PART = r"[^\s\"'`<>|,;:*?()\[\]{}\\/]+"
INNER = rf"(?:{PART}(?: {PART})*[\\/]+)"
# Not within a tag such as </s>, or a relative path.
START = r"(?<![\w/<.~\\-])"
ROOT = r"(?:file:|~[\w.-]*|[A-Za-z]:)?"
# A path of one part, as in `and /or`, may be none.
EMBEDDED = re.compile(rf"{START}{ROOT}[\\/]+{INNER}+{PART}")


@dataclass(frozen=True)
class Private:
    """What of this machine must not be seen.

    Attributes:
        folders: the home folder, the current one, the caches' and that for temporary files, the longest first.
        users: names of the user, likewise.
        hosts: names of the host, likewise.
    """

    folders: tuple[str, ...]
    users: tuple[str, ...]
    hosts: tuple[str, ...]

    @classmethod
    def here(cls) -> "Private":
        """Return what is private on this machine."""
        home = os.path.expanduser("~")
        folders = {home, os.path.realpath(home), os.getcwd(), os.environ.get("HF_HOME", "")}
        with suppress(FileNotFoundError):
            folders.add(tempfile.gettempdir())
        users = {os.path.basename(home)} - {"", "~"}
        with suppress(KeyError, OSError):  # in a container a user may have no name
            users.add(getpass.getuser())
        full = socket.gethostname()
        return cls(
            longest_first(each for each in folders if os.path.isabs(each) and os.path.dirname(each) != each),
            longest_first(users),
            longest_first({full, full.partition(".")[0]} - {"", "localhost"}),
        )

    def clean(self, value: Any, change: Callable[[str], str] | None = None) -> Any:
        """Return what json.loads gave without anything private in its texts, and in its keys that are paths.

        Args:
            value: any JSON.
            change: from a text, whose key says nothing else, to what is published: `shorten`, which is what None stands
                for, `hide` for the text of a report, `hide_tokens` for a tokenizer's.
        """
        change = change or self.shorten
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [self.clean(each, change) for each in value]
        if not isinstance(value, dict):
            return value
        cleaned: dict[str, Any] = {}
        for key, each in value.items():
            name = key if change is hide_tokens else self.shorten(key)
            while name in cleaned:
                name += "_"
            if ORIGIN.search(key):
                cleaned[name] = self.clean(each, self.name)
            elif FILE.search(key) and change is hide_tokens:
                cleaned[name] = self.clean(each, self.shorten)
            elif TECHNICAL.search(key) and not FILE.search(key):
                cleaned[name] = every_text(each, hide_tokens)
            else:
                cleaned[name] = self.clean(each, change)
        return cleaned

    def shorten(self, text: str) -> str:
        """Return a text that may be a path, or have one in it, with only the last part of what is surely private."""
        text = hide_tokens(text)
        if not re.search(r"[\\/]", text) or is_hub_id(text):
            return text
        one_part = text.startswith("/") and "/" not in text.strip("/")
        if ABSOLUTE.match(text) and not NOT_IN_PATHS.search(text) and not one_part:
            return self.last_part(text)
        for folder in self.folders:
            text = self.replace(rf"{START}{re.escape(folder)}(?![\w-])(?:[\\/]+{INNER}*{PART})?", text)
        for user in self.users:
            above = rf"(?:{ROOT}[\\/]+{INNER}*|(?:{PART}[\\/]+)*)"
            text = self.replace(rf"{START}{above}{re.escape(user)}[\\/]+{INNER}*{PART}", text)
        return text

    def hide(self, text: str) -> str:
        """Return a text, perhaps a path or one with paths in it, without any absolute path and the name of the host."""
        text = hide_tokens(text)
        if is_hub_id(text):
            return text
        if ABSOLUTE.match(text) and "\n" not in text:
            return self.last_part(text)
        return self.without_host(self.replace(EMBEDDED, self.shorten(text)))

    def name(self, text: str) -> str:
        """Return the name of a model, of data or of a folder: of a path, relative ones too, only its last part."""
        text = self.hide(text)
        is_path = re.search(r"[\\/]", text) and not is_hub_id(text) and not ADDRESS.match(text)
        return self.last_part(text) if is_path else text

    def replace(self, pattern: str | re.Pattern[str], text: str) -> str:
        """Return a text with the last parts of the paths that a pattern finds in it, outside addresses of the web."""
        pieces = ADDRESS.split(text)
        pieces[::2] = [re.sub(pattern, lambda found: self.last_part(found[0]), piece) for piece in pieces[::2]]
        return "".join(pieces)

    def last_part(self, path: str) -> str:
        """Return the last part of a path, without the host in it; `folder` where that is the user's name, or none."""
        is_windows = "\\" in path or re.match(r"[A-Za-z]:/", path)
        name = PureWindowsPath(path).name if is_windows else Path(path.removeprefix("file:")).name
        return FOLDER if name in ("", "~", *self.users) else self.without_host(name)

    def without_host(self, text: str) -> str:
        """Return a text with `host` wherever the name of the host stands in it as a word."""
        for host in self.hosts:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(host)}(?![A-Za-z0-9])", HOST, text, flags=re.IGNORECASE)
        return text


def hide_tokens(text: str) -> str:
    """Return a text without Hub tokens."""
    return TOKENS.sub(TOKEN, text)


def is_hub_id(text: str) -> bool:
    """Return whether a text may be a name on the Hub, and is none of a folder of logs."""
    return bool(hub_id(text)) and not LOGS.search(text)


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return JSON with each text changed, whatever its key; the keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [every_text(each, change) for each in value]
    return {key: every_text(each, change) for key, each in value.items()} if isinstance(value, dict) else value


def longest_first(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in an order in which none is replaced before one that it is a part of."""
    return tuple(sorted(names, key=lambda name: (-len(name), name)))


def clean_folder(folder: Path, private: Private) -> None:
    """Rewrite each JSON file of a folder that says something private; the others keep their bytes.

    Args:
        folder: that will be published.
        private: what must not be seen.

    Raises:
        CAPError: a file cannot be read.
    """
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        change = hide_tokens if path.name in TOKENIZERS else private.shorten
        cleaned = private.clean(content, private.hide if path.name == REPORT_NAME else change)
        if cleaned != content:
            path.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")
