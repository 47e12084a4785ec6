"""What a command line says: the arguments that commands share, and how they become dataclasses.

A command reads and checks its arguments before it imports what does the work: this module and those that the arguments
are from import neither torch nor transformers, so that help and a wrong argument come at once.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cap_hf.checkpoints.location import check_location
from cap_hf.commands.ways import is_replaced
from cap_hf.errors import CAPError, reason

if TYPE_CHECKING:
    from transformers import HfArgumentParser

DEFAULT_OUTPUT_DIR = "cap_hf_output"
# How a file of arguments is called, and where what is said beside it belongs.
FILE_ENDINGS = (".yaml", ".yml", ".json")
FIRST = "a file of arguments stands before all others, as in run.yaml --output_dir O"


@dataclass
class ModelArguments:
    """Which checkpoint; names as in run_image_classification.py.

    Raises:
        CAPError: the name is a path, and nothing is there.
    """

    model_name_or_path: str = field(
        metadata={"help": "A Hub id or a folder with an image classifier, a backbone or a vision tower."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token; default: the one you are logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the checkpoint brings along."})

    def __post_init__(self) -> None:
        check_location(self.model_name_or_path)


@dataclass
class ProbeArguments:
    """How features are probed with labels, where a model has no head.

    Raises:
        CAPError: a size is negative.
    """

    knn_bank_size: int = field(
        default=5000,
        metadata={
            "help": "Labelled train images that k-NN and the linear probe know, of a model without a head; 0 leaves "
            "both out."
        },
    )

    def __post_init__(self) -> None:
        if self.knn_bank_size < 0:
            raise CAPError(f"knn_bank_size={self.knn_bank_size} must be at least 0")


def make_parser(kinds: tuple[type, ...], program: str, description: str) -> "HfArgumentParser":
    """Return transformers' HfArgumentParser for these dataclasses.

    Its module needs nothing of its package, whose import takes longer than the whole of a wrong command line should:
    so the file is loaded by itself.
    """
    name = "cap_hf._hf_argparser"
    if name not in sys.modules:
        package = importlib.util.find_spec("transformers")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("transformers is not installed", name="transformers")
        spec = importlib.util.spec_from_file_location(name, Path(package.origin).with_name("hf_argparser.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    # Names are whole: a part of one would escape what looks at names, and may mean something else in the next version.
    return sys.modules[name].HfArgumentParser(
        kinds, prog=f"cap-hf {program}", description=description, allow_abbrev=False
    )


def parse(
    argv: list[str],
    program: str,
    description: str,
    *kinds: type,
    defaults: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple:
    """Return dataclasses of the given kinds from arguments; a YAML or JSON file of them may stand before the others.

    Args:
        argv: the command line, without the name of the command. What stands beside a file goes before what is in it,
            and what is one of `cap_hf.commands.ways.WAYS` before its other ways there.
        program: the name of the command.
        description: of it, for its help.
        kinds: the dataclasses.
        defaults: from the arguments that were given explicitly to defaults in the place of the usual ones.

    Raises:
        CAPError: an argument is unknown, missing or of the wrong type.
    """
    parser = make_parser(kinds, program, description)
    try:
        if argv and not argv[0].startswith("-"):
            check_file(argv)
            # Of an argument that is given twice the last one counts.
            argv = arguments_from_file(argv[0], kinds, argv[1:]) + argv[1:]
        check_whole_names(parser, argv)
        # argparse would print its usage, a screen long, before the one line that matters.
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            if defaults is not None:
                parser.set_defaults(**defaults(given(parser, argv, kinds)))
            *parsed, unknown = parser.parse_args_into_dataclasses(
                argv, return_remaining_strings=True, look_for_args_file=False
            )
    except SystemExit as error:
        if not error.code:
            raise
        if (file := next((each for each in argv if is_file_of_arguments(each)), None)) and "are required" in (
            errors.getvalue()
        ):
            raise CAPError(f"{file} comes too late: {FIRST}") from error
        raise CAPError(" ".join(errors.getvalue().partition(": error: ")[2].split())) from error
    except CAPError:
        raise
    except (TypeError, ValueError) as error:
        raise CAPError(reason(error)) from error
    if unknown:
        raise CAPError(f"unknown: {' '.join(unknown)}; cap-hf {program} --help shows the arguments")
    return tuple(parsed)


def given(parser: ArgumentParser, argv: list[str], kinds: Sequence[type]) -> dict[str, Any]:
    """Return the arguments that a command line gives explicitly, by name, also where they say what the default says."""
    unset = object()
    # argparse fills in defaults only where there is nothing yet.
    blank = Namespace(**{each.name: unset for kind in kinds for each in fields(kind)})
    found, _ = parser.parse_known_args(argv, blank)
    return {name: value for name, value in vars(found).items() if value is not unset}


def check_whole_names(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Raise a CAPError if an argument is named by the beginning of its name; the value is not in the message."""
    known = [action.option_strings for action in parser._actions]
    for name in (word.partition("=")[0] for word in argv if word.startswith("--")):
        meant = [names[0] for names in known if any(each.startswith(name) for each in names)]
        if len(name) > 2 and meant and not any(name in names for names in known):
            raise CAPError(f"{name} is no whole name: write {' or '.join(meant)}")


def is_file_of_arguments(name: str) -> bool:
    """Return whether an argument names a file that holds arguments, by its ending."""
    return not name.startswith("-") and name.lower().endswith(FILE_ENDINGS)


def check_file(argv: list[str]) -> None:
    """Raise a CAPError unless a command line that begins without a name begins with one file of arguments."""
    if not is_file_of_arguments(argv[0]):
        endings = ", ".join(FILE_ENDINGS)
        raise CAPError(
            f"{argv[0]!r} belongs to no argument: names stand before values, as in --model_name_or_path user/name; a "
            f"file of arguments ends in {endings}"
        )
    if len(argv) > 1 and not argv[1].startswith("-"):
        raise CAPError(f"{argv[1]!r} stands beside {argv[0]} without a name, as in --output_dir {argv[1]}")


def check_file_names(path: str, values: dict, kinds: Sequence[type]) -> None:
    """Raise a CAPError if a file of arguments has names with dashes before them, or arguments below a heading."""
    known = {each.name for kind in kinds for each in fields(kind)}
    for name, value in values.items():
        if str(name).startswith("-"):
            raise CAPError(
                f"{path} has {name!r}: names in a file have no dashes before them, {str(name).lstrip('-')!r}"
            )
        if isinstance(value, dict) and str(name).replace("-", "_") not in known:
            raise CAPError(
                f"{path} has {', '.join(map(str, value)) or 'nothing'} below {name!r}, which is no argument: names "
                "stand at the left edge, below nothing"
            )


class DecimalLoader(yaml.SafeLoader):
    """YAML without numbers to the base of 60, of which the pattern 2:4 would be one: 124."""

    def integer(self, node: yaml.ScalarNode) -> int | str:
        return str(node.value) if ":" in node.value else self.construct_yaml_int(node)


DecimalLoader.add_constructor("tag:yaml.org,2002:int", DecimalLoader.integer)


def arguments_from_file(path: str, kinds: Sequence[type], typed: Sequence[str] = ()) -> list[str]:
    """Return the command line that a YAML or JSON file of the same names stands for: one way of checking serves both.

    Args:
        path: of the file.
        kinds: the dataclasses whose names it may hold.
        typed: what stands beside the file, whose ways take the place of those in it.

    Raises:
        CAPError: the file cannot be read or holds something else than names and values.
    """
    try:
        values = yaml.load(Path(path).read_text(), DecimalLoader)  # a safe one; JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CAPError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(values, dict):
        raise CAPError(f"{path} must hold names and values, such as 'sparsity: [0.5, 0.75]'")
    check_file_names(path, values, kinds)
    arguments = []
    for name, value in values.items():
        if is_replaced(str(name).replace("-", "_"), str(value), typed):
            continue
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def check_output(directory: str | Path, overwrite: bool, kept: Path | None = None) -> None:
    """Raise a CAPError if a folder cannot be written, or holds something that may not be replaced.

    Args:
        directory: where to.
        overwrite: whether what is there may be replaced.
        kept: what `beside` gave for it, which may lie in it.
    """
    # Imported here: it is not needed for help and wrong arguments.
    from cap_hf.checkpoints.places import real_path
    from cap_hf.checkpoints.replacing import is_empty

    # Where a link leads, also one to a folder that is not there yet.
    directory = real_path(directory)
    existing = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    if not existing.is_dir():
        raise CAPError(f"{existing} is a file: choose another --output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CAPError(f"{existing} cannot be written: choose another --output_dir")
    if directory == existing and not overwrite and not is_empty(directory, kept):
        raise CAPError(f"{directory} exists: choose another --output_dir or pass --overwrite_output_dir")


def beside(output: str | Path, suffix: str) -> Path:
    """Return the folder for what a run keeps until it is over: `OUTPUT-suffix`, where links of the output lead to.

    It is `OUTPUT/suffix` where nothing can be written beside the output, or another disk begins with it.
    """
    from cap_hf.checkpoints.places import real_path

    output = real_path(output)
    if output.is_dir() and (os.path.ismount(output) or not os.access(output.parent, os.W_OK | os.X_OK)):
        return output / suffix
    return output.with_name(f"{output.name}-{suffix}")
