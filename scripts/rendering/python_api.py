"""docs/python.md: every public name of `cap_hf`, out of its docstring."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import cap_hf

HEAD = """# Python interface

Every name that `cap_hf` gives out, with its signature and its docstring. How they work together is on the pages
[pruning in one call](../README.md), [recovery](recovery.md), [checkpoints](checkpoints.md) and
[inference](inference.md). Everything below `cap_hf.` that is not on this page may change with any version.

This page is written by `.venv/bin/python scripts/docs.py`.
"""
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")
# A signature that is longer has a line per argument.
WIDTH = 100


def render() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(entry(name, getattr(cap_hf, name)) for name in cap_hf.__all__)])


def entry(name: str, thing: Any) -> str:
    """Return the section of one public name."""
    parts = [f"## {name}\n"]
    if not inspect.isclass(thing):
        return "\n".join([*parts, signature(thing, name), describe(thing)])
    own_fields = vars(thing).get("__dataclass_fields__", {})
    if "__init__" in vars(thing) and not own_fields:
        parts.append(signature(thing.__init__, name))
    parts += [describe(thing, skip=("Attributes",) if own_fields else ()), fields(thing) if own_fields else ""]
    for member, function, kind in methods(thing):
        parts += [f"### {name}.{member}\n", signature(function, member, kind), describe(function)]
    return "\n".join(part for part in parts if part)


def methods(kind: type) -> Iterator[tuple[str, Any, str]]:
    """Yield the public methods and properties that a class defines itself: name, function and what it is."""
    for name, member in vars(kind).items():
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(member, property):
            yield name, member.fget, "property"
        elif isinstance(member, classmethod | staticmethod):
            yield name, member.__func__, type(member).__name__
        elif inspect.isfunction(member):
            yield name, member, ""


def signature(function: Any, name: str, kind: str = "") -> str:
    """Return a signature as its author wrote it, which every version of Python shows in the same way."""
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(node, ast.FunctionDef)
    returns = f" -> {unquoted(node.returns)}" if node.returns and node.name != "__init__" else ""
    written = list(arguments(node.args))
    line = name + ("" if kind == "property" else f"({', '.join(written)})") + returns
    if len(line) > WIDTH:
        inside = "".join(f"    {each},\n" for each in written)
        line = f"{name}(\n{inside}){returns}"
    decorator = f"@{kind}\n" if kind else ""
    return f"```text\n{decorator}{line}\n```\n"


def arguments(node: ast.arguments) -> Iterator[str]:
    """Yield each argument with its annotation and default, without self and cls."""
    plain = [*node.posonlyargs, *node.args]
    defaults = [None] * (len(plain) - len(node.defaults)) + node.defaults
    groups = [("", argument, value) for argument, value in zip(plain, defaults, strict=True)]
    groups += [("*", node.vararg, None)] if node.vararg else []
    groups += [("", argument, value) for argument, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
    groups += [("**", node.kwarg, None)] if node.kwarg else []
    for stars, argument, value in groups:
        if argument.arg in ("self", "cls"):
            continue
        annotation = f": {unquoted(argument.annotation)}" if argument.annotation else ""
        default = f"{' = ' if annotation else '='}{ast.unparse(value)}" if value else ""
        yield f"{stars}{argument.arg}{annotation}{default}"


def unquoted(annotation: ast.expr) -> str:
    """Return an annotation, also one that stands in quotes."""
    return ast.unparse(annotation).replace("'", "")


def describe(thing: Any, skip: Sequence[str] = ()) -> str:
    """Return a docstring in Markdown: its text, and its sections but those to skip as lists."""
    text, sections = read_docstring(thing)
    parts = [f"{text}\n"] if text else []
    for title, items in sections.items():
        if title not in skip:
            lines = [f"- {listed(name)}: {meaning}" if name else meaning for name, meaning in items]
            parts.append(f"**{title}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def read_docstring(thing: Any) -> tuple[str, dict[str, list[tuple[str, str]]]]:
    """Return a docstring's text, and of each section the items: name and meaning; a paragraph has no name."""
    body, *rest = re.split(rf"^({'|'.join(SECTIONS)}):\n", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    # Of a dataclass without a docstring Python makes one up out of its fields.
    if inspect.isclass(thing) and body.startswith(f"{thing.__name__}("):
        body = ""
    sections = {}
    for title, text in zip(rest[::2], rest[1::2], strict=True):
        text = textwrap.dedent(text).strip()
        if title in ("Returns", "Yields"):
            sections[title] = [("", " ".join(text.split()))]
            continue
        items = [" ".join(item.split()) for item in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if item.strip()]
        sections[title] = [(name, meaning) for name, _, meaning in (item.partition(": ") for item in items)]
    return body.strip(), sections


def listed(names: str) -> str:
    """Return `a, b` as code."""
    return ", ".join(f"`{name}`" for name in names.split(", "))


def fields(kind: type) -> str:
    """Return a table of the fields that a dataclass adds to its bases."""
    meanings = {
        name: meaning for names, meaning in read_docstring(kind)[1].get("Attributes", []) for name in names.split(", ")
    }
    # HfArgumentParser changes the types that the fields themselves hold.
    annotations = inspect.get_annotations(kind)
    rows = []
    for each in (each for each in dataclasses.fields(kind) if each.name in annotations):
        written = annotations[each.name]
        written = written if isinstance(written, str) else inspect.formatannotation(written)
        value = "required" if each.default is dataclasses.MISSING else f"`{each.default!r}`"
        if each.default_factory is not dataclasses.MISSING:
            value = f"`{each.default_factory()!r}`"
        meaning = each.metadata.get("help") or meanings.get(each.name, "")
        cells = [f"`{each.name}`", f"`{strip_modules(written)}`", value, meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    foreign = [base.__name__ for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)]
    more = [f"\nAnd the fields of `{foreign[0]}`."] if foreign else []
    return "\n".join(["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows, *more, ""])


def strip_modules(annotation: str) -> str:
    """Return an annotation without the modules of its names."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", annotation)
