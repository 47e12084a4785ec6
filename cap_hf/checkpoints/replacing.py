"""Tell which folders may be replaced: nothing is lost but one checkpoint, as cap_hf and the Trainer write them.

A folder is replaced if it is empty, or if it has the config.json of a model and all that lies beside it has the name of
a checkpoint's part: weights, ONNX, configs, a tokenizer, code that the configs ask for, reports, a card, logs. There is
no folder among these but those of logs, of evaluation results and of a page's charts, so that no dataset, no other
checkpoint and no current folder ever goes along.
What the commands that measure a checkpoint write may also lie alone.
"""

import filecmp
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cap_hf.checkpoints.folder import COMPANIONS, MODEL_CONFIG_NAME, REPORT_NAME, read_json
from cap_hf.checkpoints.places import writing
from cap_hf.config import CONFIG_NAME
from cap_hf.errors import CAPError

# What is no content of a disk: mkfs makes it.
LOST_AND_FOUND = "lost+found"
# What stays in a folder whose content is exchanged: also what a run keeps in an output that is a disk of its own.
KEPT = (LOST_AND_FOUND, "training", "collection")
# JSON that may ask for code.
CONFIGS = (MODEL_CONFIG_NAME, "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
# The page of a run, and the folder beside it: what the run has noted down for it, and its charts.
PAGE, PAGE_FOLDER, RECORD = "report.html", "report", "recorded.json"
CHARTS = (
    "accuracy",
    "search",
    "sparsity-map",
    "loss-map",
    "next-removal",
    "total-loss",
    "kinds",
    "spectrum",
    "training-loss",
    "training-accuracy",
    "learning-rate",
    "training-sparsity",
    "rate",
    "speedup",
    "seconds",
)
# Of the commands that measure a checkpoint.
RESULTS = {"eval_results.json", "inspect.json", "benchmark.json", "benchmark.png", PAGE}
PARTS = {
    *CONFIGS,
    *COMPANIONS,
    CONFIG_NAME,
    REPORT_NAME,
    # Of transformers.
    "generation_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    # Of the Trainer.
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    # Of the Hub.
    "README.md",
    "sparsity.png",
    "LICENSE",
    ".gitattributes",
    # Of a desktop that looked into the folder.
    ".DS_Store",
}
WEIGHTS = re.compile(r"model(\.cap)?(-\d+-of-\d+)?\.safetensors(\.index\.json)?|model\.onnx(\.data)?")
# The Trainer's folder of logs, and what is in it.
LOGS, LOG = "runs", "events.out.tfevents"
# The folder of evaluation results that a push writes.
EVAL_RESULTS = ".eval_results"


def check_replaceable(folder: str | Path, source: str | Path | None = None) -> None:
    """Raise a CAPError if something would be lost with a folder that is replaced; one that is not there may be.

    Args:
        folder: that is to be written; a link stands for the folder that it leads to.
        source: a checkpoint that is copied; a file that is the same there is not lost.

    Raises:
        CAPError: something in the folder would be lost, the folder is the source, or it may not be looked into.
    """
    folder = Path(os.path.realpath(folder))
    if not folder.is_dir():
        return
    source = None if source is None else Path(os.path.realpath(source))
    if source == folder:
        raise CAPError(f"{folder} is the checkpoint itself: choose another --output_dir")
    with writing(folder):
        names = sorted(name for name in os.listdir(folder) if not stays(name, folder))
    # A config.json beside weights may also be damaged.
    is_model = MODEL_CONFIG_NAME in names and any(WEIGHTS.fullmatch(name) for name in names)
    is_model = is_model or "model_type" in _json(folder / MODEL_CONFIG_NAME)
    parts = RESULTS | PARTS | _code(folder) if is_model else RESULTS
    for name in names:
        if _is_part(folder / name, parts, is_model):
            continue
        if source is not None and _is_same(folder / name, source / name):
            continue
        raise CAPError(
            f"{folder} holds {name}, which would be lost: only an empty folder, or one of a single checkpoint and "
            "nothing else, is replaced; choose another folder"
        )


def stays(name: str, folder: Path) -> bool:
    """Return whether something in a folder is left there when the folder's content is exchanged."""
    return name in KEPT or is_partial(name, folder)


def is_partial(name: str, path: Path) -> bool:
    """Return whether a folder has the name of one in which `path` is being written."""
    return name.startswith(f".{path.name}.") and name.endswith(".partial")


def has_to_stay(folder: Path) -> bool:
    """Return whether a folder is a mount point, what the current folder lies in, or holds something that stays."""
    if not folder.is_dir():
        return False
    if os.path.ismount(folder):
        return True
    with suppress(FileNotFoundError):  # a current folder that was removed lies nowhere
        if Path(os.path.realpath(".")).is_relative_to(folder):
            return True
    with suppress(FileNotFoundError):  # another run took it away since the first look
        return any(stays(name, folder) for name in os.listdir(folder))
    return False


def is_empty(folder: Path, but: Path | None = None) -> bool:
    """Return whether a folder that is there holds nothing but one path; what mkfs puts onto a new disk is nothing.

    Raises:
        CAPError: it may not be looked into.
    """
    with writing(folder):
        return all(name == LOST_AND_FOUND or folder / name == but for name in os.listdir(folder))


def _is_part(path: Path, parts: set[str], is_model: bool) -> bool:
    """Return whether something is one of these files, the charts of a page or, beside a model, weights or logs."""
    if path.name == EVAL_RESULTS and path.is_dir() and not path.is_symlink():
        return is_model and all(each.suffix == ".yaml" and each.is_file() for each in path.iterdir())
    if path.name == LOGS:
        return is_model and all(file.startswith(LOG) for _, _, files in os.walk(path) for file in files)
    if path.name == PAGE_FOLDER and path.is_dir() and not path.is_symlink():
        known = {RECORD, *(f"{chart}.png" for chart in CHARTS)}
        return all(each.name in known and each.is_file() for each in path.iterdir())
    is_file = path.is_symlink() or path.is_file()
    return is_file and (path.name in parts or (is_model and WEIGHTS.fullmatch(path.name) is not None))


def _is_same(path: Path, other: Path) -> bool:
    """Return whether two files are there and hold the same."""
    with suppress(OSError):
        return path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)
    return False


def _code(folder: Path) -> set[str]:
    """Return the names of the files with code that a checkpoint's JSON asks for, and of those that these import."""
    found = set()
    for value in _texts([_json(folder / name).get("auto_map") for name in CONFIGS]):
        path = folder / f"{value.split('--')[-1].split('.')[0]}.py"
        found.add(path.name)
        # Imported here: transformers takes longer than the line about a wrong output folder should.
        from transformers.dynamic_module_utils import get_relative_import_files

        with suppress(OSError, ValueError):
            found |= {Path(each).name for each in get_relative_import_files(path)}
    return found


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in what a JSON file holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _json(path: Path) -> dict:
    """Return what a JSON file holds, or nothing where it cannot be read."""
    with suppress(CAPError):
        return read_json(path)
    return {}
