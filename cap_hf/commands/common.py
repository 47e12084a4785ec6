"""What the subcommands share: parsing, loading a checkpoint with its image processor, printing tables."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import transformers
import yaml
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cap_hf.data.images import DataArguments, ImageDataset, load_splits
from cap_hf.errors import CAPError, reason
from cap_hf.targets import summarize

DEFAULT_OUTPUT_DIR = "cap_hf_output"


@dataclass
class ModelArguments:
    """Which checkpoint; names as in run_image_classification.py."""

    model_name_or_path: str = field(metadata={"help": "A Hub id or a folder with a finetuned image classifier."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token; default: the one you are logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the checkpoint brings along."})


def parse(argv: list[str], program: str, description: str, *kinds: type) -> tuple:
    """Dataclasses from arguments, or from a single YAML or JSON file of the same names.

    Raises:
        CAPError: an argument is unknown, missing or of the wrong type.
    """
    parser = HfArgumentParser(kinds, prog=f"cap-hf {program}", description=description)
    try:
        if len(argv) == 1 and argv[0].endswith((".yaml", ".yml", ".json")):
            argv = arguments_from_file(argv[0])
        # argparse would print its usage, a screen long, before the one line that matters.
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            return parser.parse_args_into_dataclasses(argv)
    except SystemExit as error:
        if not error.code:
            raise
        raise CAPError(errors.getvalue().strip().splitlines()[-1].split("error: ")[-1]) from error
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, CAPError) else CAPError(reason(error)) from error


def arguments_from_file(path: str) -> list[str]:
    """The command line that a YAML or JSON file of the same names stands for: one way of checking serves both.

    Raises:
        CAPError: the file cannot be read or holds something else than names and values.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CAPError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(values, dict):
        raise CAPError(f"{path} must hold names and values, such as 'sparsity: [0.5, 0.75]'")
    arguments = []
    for name, value in values.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def load_model(args: ModelArguments) -> PreTrainedModel:
    """The checkpoint in float32, whole: a weight that it lacks is an error, never a random one.

    Raises:
        CAPError: the checkpoint cannot be loaded or lacks weights.
    """
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            revision=args.model_revision,
            cache_dir=args.cache_dir,
            token=args.token,
            trust_remote_code=args.trust_remote_code,
            dtype="float32",
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # configuration, file format, network
        raise CAPError(f"{args.model_name_or_path} cannot be loaded: {reason(error)}") from error
    lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lost:
        raise CAPError(
            f"{args.model_name_or_path} has no weights for {summarize(lost, 3)}: "
            "a checkpoint finetuned for image classification is needed"
        )
    return model


def load_image_processor(args: ModelArguments) -> object:
    """The checkpoint's own image processor.

    Raises:
        CAPError: it has none.
    """
    # Without torchvision the processor falls back to PIL and says so in a warning of several lines.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoImageProcessor.from_pretrained(
            args.model_name_or_path,
            revision=args.model_revision,
            cache_dir=args.cache_dir,
            token=args.token,
            trust_remote_code=args.trust_remote_code,
        )
    except Exception as error:  # configuration, network
        raise CAPError(f"{args.model_name_or_path} has no image processor: {reason(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_all(
    model_args: ModelArguments, data_args: DataArguments, seed: int, needed: Sequence[str] = ("train", "eval")
) -> tuple[PreTrainedModel, object, dict[str, object]]:
    """A model, its image processor and the splits of the data that are needed, unprocessed.

    Raises:
        CAPError: as `load_model`, `load_image_processor` and `load_splits`.
    """
    transformers.set_seed(seed)
    model = load_model(model_args)
    return model, load_image_processor(model_args), load_splits(data_args, seed, model_args.token, needed)


def eval_dataset(splits: dict, image_processor: object, model: PreTrainedModel, args: DataArguments) -> ImageDataset:
    """The eval split as the model's inputs."""
    return ImageDataset(splits["eval"], image_processor, model.config, args)


def check_output(directory: Path, overwrite: bool) -> None:
    """Raise a CAPError if a folder cannot be written, or holds something that may not be replaced."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise CAPError(f"{existing} is a file: choose another --output_dir")
    if not os.access(existing, os.W_OK):
        raise CAPError(f"{existing} cannot be written: choose another --output_dir")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise CAPError(f"{directory} exists: choose another --output_dir or pass --overwrite_output_dir")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(lines)


def percent(value: float | None, digits: int = 2) -> str:
    """`0.875` -> `87.50`; None -> `-`."""
    return "-" if value is None else f"{100 * value:.{digits}f}"
