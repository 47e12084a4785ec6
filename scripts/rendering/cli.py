"""docs/cli.md: every command of `cap-hf` with its arguments, out of the parsers themselves."""

import argparse
import enum
import importlib
import re
from collections.abc import Sequence
from typing import Any, NoReturn
from unittest import mock

from transformers import TrainingArguments

from cap_hf.commands.main import COMMANDS

HEAD = """# Command line

Every command of `cap-hf`, with all its arguments and their defaults. `cap-hf <command> --help` prints the same.

Arguments can also stand in one YAML or JSON file of the same names, `cap-hf prune run.yaml`; what stands after the
file goes before what is in it, `cap-hf prune run.yaml --sparsity 0.9`, and before another way of saying the same:
`--budget`, `--sparsity`, `--max_accuracy_drop` and an N:M `--allocation` take each other's place, and so do
`--num_train_epochs` and `--max_steps`. `scripts/recipes/` holds files for the runs of the paper. A list takes several
values, `--sparsity 0.5 0.75`; a yes-or-no argument takes `true` or `false`. A command ends with exit code 0 only when
its work is done; a mistake is one line that says what to change, and exit code 1.

This page is written by `.venv/bin/python scripts/docs.py`.
"""


# Of an argument with more choices only the first ones are shown; helps longer than this are cut to a sentence.
CHOICES, HELP = 8, 250


class Found(BaseException):
    """Carries a command's parser out of the command; no `except Exception` on the way may hold it up."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command: the command runs up to the point where it would parse its arguments."""

    def stop(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> NoReturn:
        raise Found(parser)

    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
            importlib.import_module(f"cap_hf.commands.{command}").main([])
    except Found as found:
        return found.args[0]
    raise RuntimeError(f"cap-hf {command} parses no arguments")


def render() -> str:
    """Return the page."""
    sections = [HEAD]
    for command, purpose in COMMANDS.items():
        parser = parser_of(command)
        sections.append(f"## cap-hf {command}\n\n{parser.description or purpose}\n")
        # Several arguments of one name: a yes-or-no argument that is yes by default also has its `--no_` form.
        actions: dict[str, argparse.Action] = {}
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                actions.setdefault(action.dest, action)
        for kind in parser.dataclass_types:
            own, inherited = split_fields(kind)
            sections.append(f"{summary(kind)}\n\n{table([actions[name] for name in own])}\n")
            if inherited:
                text = "And those of transformers' `TrainingArguments`, as they are in the pinned version:"
                sections.append(f"{text}\n\n{table([actions[name] for name in inherited])}\n")
    return "\n".join(sections)


def split_fields(kind: type) -> tuple[list[str], list[str]]:
    """Return the names of a dataclass's own fields, and of those that it has from transformers."""
    # Without those that are no arguments.
    names = [name for name, each in kind.__dataclass_fields__.items() if each.init]
    if not issubclass(kind, TrainingArguments):
        return names, []
    own = [name for name in names if name in vars(kind)["__annotations__"]]
    return own, [name for name in names if name not in own]


def summary(kind: type) -> str:
    """Return the first line of a dataclass's docstring."""
    return (kind.__doc__ or "").strip().splitlines()[0]


def table(actions: Sequence[argparse.Action]) -> str:
    """Return a Markdown table with a row per argument."""
    cells = [(f"`{each.option_strings[0]}`", values(each), default(each), text(each)) for each in actions]
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(["| argument | values | default | meaning |", "| --- | --- | --- | --- |", *rows])


def values(action: argparse.Action) -> str:
    """Return what an argument takes."""
    if action.choices:
        choices = [f"`{choice}`" for choice in action.choices]
        kind = ", ".join(choices[:CHOICES]) + (f" ... ({len(choices)} in all)" if len(choices) > CHOICES else "")
    else:
        name = getattr(action.type, "__name__", "str")
        kind = {"string_to_bool": "true, false", "str": "text", "int": "whole number", "float": "number"}.get(
            name, name
        )
    return f"{kind}; several" if action.nargs in ("+", "*") else kind


def default(action: argparse.Action) -> str:
    """Return an argument's default, or that it is required."""
    if action.required:
        return "required"
    value: Any = action.default
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or value == [] or value == "":
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"


def text(action: argparse.Action) -> str:
    """Return an argument's help, of long ones the first sentence, as one cell of a table."""
    words = " ".join((action.help or "").replace("%%", "%").split())
    if len(words) > HELP:
        words = re.split(r"(?<=[.!])\s", words)[0]
    return words.replace("|", "\\|")
