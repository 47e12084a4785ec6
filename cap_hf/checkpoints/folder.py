"""What beside weights a checkpoint folder holds, perhaps received from somebody else: links and JSON, checked.

Nothing of it is believed: a link stays inside its folder, JSON is parsed before it is copied, and what is used of a
report or a config has the type that it is used as.
"""

import json
import os
import shutil
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from cap_hf.checkpoints.metrics import Measured
from cap_hf.config import CONFIG_NAME, CAPConfig
from cap_hf.errors import CAPError, reason

MODEL_CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
REPORT_NAME = "report.json"
# What a text tower is used with, and the processor of several towers: they go wherever the weights go.
COMPANIONS = (
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
# More than any JSON of a checkpoint takes.
JSON_BYTES = 100 * 2**20


class LayerFacts(TypedDict, total=False):
    """What a report says of one target."""

    name: str
    num_zeros: int
    mask_digest: str


class RefitFacts(TypedDict, total=False):
    """What a report says of the refit."""

    examples: int


class PruningFacts(TypedDict, total=False):
    """What a report says of the pruning."""

    layers: list[LayerFacts] | None
    refit: RefitFacts | None


class HealingFacts(TypedDict, total=False):
    """What a report says of the healing."""

    steps: int
    batch_size: int
    images: int
    learning_rate: float


class DataFacts(TypedDict, total=False):
    """What a report says of the data."""

    dataset_name: str | None
    dataset_config_name: str | None
    eval_split_name: str | None


class Report(TypedDict, total=False):
    """The entries of a report.json that cap_hf reads again; it may hold more."""

    model_name_or_path: str | None
    model_revision: str | None
    teacher_model_name_or_path: str | None
    training_arguments: dict | None
    num_processes: int | None
    config: dict | None
    data: DataFacts | None
    seed: int | None
    versions: dict[str, str] | None
    dense: Measured | None
    sparse: Measured | None
    recovered: Measured | None
    pruning: PruningFacts | None
    healing: HealingFacts | None
    layers: list[LayerFacts] | None


class TargetLists(TypedDict, total=False):
    """The entries of a cap_config.json that CAPConfig takes as they come."""

    include: list[str] | None
    exclude: list[str] | None


def read_json(path: str | Path) -> dict:
    """Return the object that a JSON file holds.

    Raises:
        CAPError: it cannot be read, or holds something else.
    """
    path = Path(path)
    # A pipe would be waited for, and a device has no end.
    if not path.is_file():
        raise CAPError(f"{path} is not there, or is no file")
    try:
        if path.stat().st_size > JSON_BYTES:
            raise CAPError(f"{path} is larger than {JSON_BYTES:,} bytes: that is no JSON of a checkpoint")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CAPError):
            raise
        raise CAPError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(content, dict):
        raise CAPError(f"{path} holds no JSON object")
    return content


def read_report(folder: str | Path) -> Report:
    """Return the report of a checkpoint, or an empty one if it has none.

    Raises:
        CAPError: report.json cannot be read, or what it holds has a wrong type.
    """
    path = Path(folder) / REPORT_NAME
    if not os.path.lexists(path):
        return {}
    report = read_json(path)
    check_types(report, Report, path)
    return cast(Report, report)  # checked, of what Report names; mypy cannot follow that


def read_cap_config(folder: str | Path) -> CAPConfig | None:
    """Return the CAPConfig of a checkpoint: of cap_config.json or else of its report; None if it has neither.

    Raises:
        CAPError: what is there cannot be read, or is no CAPConfig.
    """
    path = Path(folder) / CONFIG_NAME
    values: dict | None
    if os.path.lexists(path):
        values = read_json(path)
    else:
        path = Path(folder) / REPORT_NAME
        values = read_report(folder).get("config")
        if not values:
            return None
    check_types(values, TargetLists, path)
    try:
        return CAPConfig.from_dict(values)
    except (CAPError, TypeError) as error:
        raise CAPError(f"{path} holds no settings of cap_hf: {reason(error)}") from error


def check_model_config(folder: str | Path, num_tensors: int) -> None:
    """Raise a CAPError if config.json cannot be read, or asks for more layers than there are tensors.

    Layers without weights would come up random, and so many of them could keep transformers building for days.

    Args:
        folder: of the checkpoint.
        num_tensors: that its weight files hold.
    """
    path = Path(folder) / MODEL_CONFIG_NAME
    entries = list(read_json(path).items())
    while entries:
        key, value = entries.pop()
        if isinstance(value, dict):
            entries += value.items()
        for count in value if isinstance(value, list) else [value]:
            if ("layers" in key or "depths" in key) and isinstance(count, int) and count > num_tensors:
                raise CAPError(f"{path} asks for {count} {key}, and the weights are {num_tensors} tensors in all")


def check_types(value: Any, expected: Any, place: str | Path) -> None:
    """Raise a CAPError that names the place where a value out of JSON does not have a type.

    Args:
        value: what json.loads returns.
        expected: str, int, float (which an int is too), dict, `X | None`, `list[X]`, `dict[str, X]`, or a TypedDict,
            whose names need not be there and are not the only ones.
        place: of the value, for the error.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        if value is not None:
            check_types(value, arguments[0], place)
    elif is_typeddict(expected):
        check_types(value, dict, place)
        for name, hint in get_type_hints(expected).items():
            if name in value:
                check_types(value[name], hint, f"{place}: {name}")
    elif origin in (list, dict):
        check_types(value, origin, place)
        for index, each in value.items() if origin is dict else enumerate(value):
            check_types(each, arguments[-1], f"{place}[{index!r}]")
    else:
        kinds = (int, float) if expected is float else expected
        # A bool is an int to Python, and an int may be larger than any float.
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
            raise CAPError(f"{place} is {shorten(repr(value))}, which is no {expected.__name__}")


def shorten(text: str, limit: int = 60) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= limit else f"{text[:limit]} ..."


def check_inside(path: Path, folder: Path) -> None:
    """Raise a CAPError if a file of a folder is a link that leads out of it.

    The snapshots of the Hub's cache consist of links to the blobs beside them, which may be followed.

    Args:
        path: of the file.
        folder: that it belongs to.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(each) for each in homes):
        raise CAPError(f"{path} is a link out of its folder: put the file itself there, if it is yours to give")


def copy_file(path: Path, folder: Path, destination: Path) -> None:
    """Copy a file of a folder into another one, under its name.

    Raises:
        CAPError: it is a link out of its folder, or is called JSON and is none.
    """
    check_inside(path, folder)
    if path.suffix == ".json":
        read_json(path)
    shutil.copyfile(path, destination / path.name)
