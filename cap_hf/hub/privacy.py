r"""What a published file says of the machine that it was made on: nothing.

A report has the absolute paths of models and data, a config where its model was loaded from, a folder of logs the name
of the host. Files here may say so; what is published has short names in their place: of a path its last part, as the
card has it. What is private is told by its value, whatever it is called: an absolute path (`/a/b`, `C:\a\b`,
`\\host\a`, `~/a`, `file:///a`), the home folder, the user's name as a part of a path, the host's name, a token.
"""

import getpass
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from cap_hf.checkpoints.folder import REPORT_NAME, read_json
from cap_hf.hub.card import hub_id

# A vocabulary has any text in it, and no path.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
# Where classes are named: one may be called /m/01yrx, or like the host.
LABELS = ("id2label", "label2id")
# What stands in place of a path that ends with the user's name, of the host's name, of a token.
FOLDER, HOST, TOKEN = "folder", "host", "token"

TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
# How the Trainer calls a folder of logs, `runs/Jul05_12-00-00_host`, which could be a Hub id.
LOGS = re.compile(r"\d\d-\d\d-\d\d_")
# A text that is a path as a whole.
ABSOLUTE = re.compile(r"(file://)?/[^/\s]|[A-Za-z]:[\\/]|\\\\[^\\]|~[\w.-]*[\\/]")
# A part of a path within a text: it ends at a blank, and at what cannot be in a name without quotes.
PART = r"[^\s\"'`<>|,;:*?()\[\]{}\\/]+"
# Not within an address of the web, a tag such as </s>, or a relative path.
START = r"(?<![\w/<.~\\-])"
# The folders of users, and any path of more than one part: a single one, as in `and /or`, may be none.
HOMES = re.compile(rf"{START}(?:/home|/Users|/root|[A-Za-z]:[\\/]Users)(?:[\\/]{PART})+", re.IGNORECASE)
EMBEDDED = re.compile(rf"{START}(?:file://|~[\w.-]*|[A-Za-z]:)?(?:[\\/]{PART}){{2,}}")


@dataclass(frozen=True)
class Private:
    """What of this machine must not be seen.

    Attributes:
        folders: the home folder, the current one, the caches' and that for temporary files, the longest first.
        users: names of the user.
        hosts: names of the host, the longest first.
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

    def clean(self, value: Any, words: bool = False, kept: Iterable[str] = ()) -> Any:
        """Return what json.loads gave without anything private in its texts, keys among them.

        Args:
            value: any JSON.
            words: whether a text that is a word alone may be the host's name; else it may be an architecture's.
            kept: texts that stay, such as names of layers.
        """
        if isinstance(value, str):
            return value if value in kept else self.short(value, words)
        if isinstance(value, list):
            return [self.clean(each, words, kept) for each in value]
        if not isinstance(value, dict):
            return value
        cleaned = {}
        for key, each in value.items():
            if key in LABELS and isinstance(each, dict):
                cleaned[key] = {self.clean_label(name): self.clean_label(number) for name, number in each.items()}
            else:
                # A key is what somebody looks for, unless it is a path.
                cleaned[self.clean(key, False, kept)] = self.clean(each, words, kept)
        return cleaned

    def clean_label(self, label: Any) -> Any:
        """Return the name of a class; only one in a private folder is changed."""
        if not isinstance(label, str) or not (HOMES.search(label) or any(each in label for each in self.folders)):
            return label
        return self.short(label, words=False)

    def short(self, text: str, words: bool = True) -> str:
        """Return a text, perhaps a path or one with paths in it, without anything private; `words` as of `clean`."""
        text = TOKENS.sub(TOKEN, text)
        if ABSOLUTE.match(text) and "\n" not in text:
            return self.last_part(text)
        if hub_id(text) and not LOGS.search(text):
            return text
        if " " not in text and "://" not in text and set(self.users).intersection(re.split(r"[\\/]", text)[:-1]):
            return self.last_part(text)
        for folder in self.folders:
            here = rf"{START}{re.escape(folder)}(?![\w-])(?:/{PART})*"
            text = re.sub(here, lambda found: self.last_part(found[0]), text)
        for pattern in (HOMES, EMBEDDED):
            text = pattern.sub(lambda found: self.last_part(found[0]), text)
        return text if not words and re.fullmatch(r"[A-Za-z_]+", text) else self.without_host(text)

    def last_part(self, path: str) -> str:
        """Return the last part of a path, without the host in it; `folder` where that is the user's name, or none."""
        is_windows = "\\" in path or re.match(r"[A-Za-z]:/", path)
        name = PureWindowsPath(path).name if is_windows else Path(path.removeprefix("file://")).name
        return FOLDER if name in ("", "~", *self.users) else self.without_host(name)

    def without_host(self, text: str) -> str:
        """Return a text with `host` wherever the name of the host stands in it as a word."""
        for host in self.hosts:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(host)}(?![A-Za-z0-9])", HOST, text, flags=re.IGNORECASE)
        return text


def longest_first(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in an order in which none is replaced before one that it is a part of."""
    return tuple(sorted(names, key=lambda name: (-len(name), name)))


def clean_folder(folder: Path, private: Private, kept: Iterable[str] = ()) -> None:
    """Rewrite each JSON file of a folder that says something private; the others keep their bytes.

    Args:
        folder: that will be published.
        private: what must not be seen.
        kept: names of layers.

    Raises:
        CAPError: a file cannot be read.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name in VOCABULARIES:
            continue
        content = read_json(path)
        # A report is read by people; what else there is has names that transformers and cap_hf look for.
        cleaned = private.clean(content, path.name == REPORT_NAME, frozenset(kept))
        if cleaned != content:
            path.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")
