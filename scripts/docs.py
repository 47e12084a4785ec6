"""Writes the pages of docs/ that are rendered from the code: cli.md, python.md, and the picture in architecture.md.

.venv/bin/python scripts/docs.py            # write them
.venv/bin/python scripts/docs.py --check    # write nothing; exit code 1 if one of them is not what it should be
"""

import argparse
import re
import sys
from pathlib import Path

from rendering import cli, python_api, rooms

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = re.compile(r"(<!-- rooms: written by scripts/docs.py -->\n)(.*?)(\n<!-- end of rooms -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return every rendered page as it should be, by its path."""
    architecture = DOCS / "architecture.md"
    text, pictures = PICTURE.subn(lambda match: match[1] + rooms.render() + match[3], architecture.read_text())
    if pictures != 1:
        raise ValueError(f"{architecture} must have one pair of marks for the picture of the rooms, not {pictures}")
    return {DOCS / "cli.md": cli.render(), DOCS / "python.md": python_api.render(), architecture: text}


def outdated() -> list[Path]:
    """Return the pages that are not what the code says."""
    return [path for path, text in pages().items() if not path.exists() or path.read_text() != text]


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    if parser.parse_args().check:
        wrong = outdated()
        for path in wrong:
            print(f"{path} is out of date: run `.venv/bin/python scripts/docs.py`", file=sys.stderr)
        return int(bool(wrong))
    for path, text in pages().items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
