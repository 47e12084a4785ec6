"""README and docs: where they are, their fenced blocks, and the scripts that render some of them."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

sys.path.append(str(ROOT / "scripts"))

from rendering import cli, python_api, rooms  # noqa: E402

__all__ = ["PAGES", "ROOT", "Block", "cli", "load_generator", "python_api", "read_blocks", "rooms"]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: that it is on.
        line: of the page on which its text begins, from 1.
        language: the first word after the fence.
        title: the rest of that line: of a YAML or JSON file its name.
        text: between the fences.
    """

    page: Path
    line: int
    language: str
    title: str
    text: str


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    blocks = []
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            language, _, title = token.info.strip().partition(" ")
            blocks.append(Block(page, token.map[0] + 2, language, title, token.content))
    return blocks


def load_generator() -> ModuleType:
    """Return scripts/docs.py as a module; by its path, because tests/docs/ has the same name."""
    spec = importlib.util.spec_from_file_location("scripts_docs", ROOT / "scripts" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
