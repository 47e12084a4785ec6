"""The pages say what the code says: rendered pages, messages, links, and the length of the README."""

import ast
import re

import pytest
from support.pages import PAGES, ROOT, load_generator

BACKTICKS = re.compile(r"^- `([^`]+)`", re.MULTILINE)


def test_rendered_pages_are_up_to_date():
    outdated = [path.name for path in load_generator().outdated()]
    assert not outdated, f"{outdated} are not what the code says: run `.venv/bin/python scripts/docs.py`"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def strings_of_the_package() -> list[str]:
    """Return every string in the source, with a NUL for each part that differs from case to case."""
    found = []
    for path in (ROOT / "cap_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdr]", "\0", node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts))
    return found


@pytest.fixture(scope="module")
def sources() -> list[str]:
    return strings_of_the_package()


def messages() -> list[str]:
    found = BACKTICKS.findall((ROOT / "docs" / "troubleshooting.md").read_text())
    return [" ".join(message.split()) for message in found]


@pytest.mark.parametrize("message", messages())
def test_messages_of_troubleshooting_are_in_the_source(sources, message):
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert any(re.fullmatch(pattern, source, re.DOTALL) for source in sources), (
        f"no message of cap_hf reads {message!r} any more: change or remove it in docs/troubleshooting.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert [target for target in local if not (page.parent / target).exists()] == []
