"""Write checkpoints so that a final name never holds half of one."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from cap_hf.checkpoints.weights import compress_weights
from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError

REPORT_NAME = "report.json"
# Weights in any format: a copy of a checkpoint in another form leaves them behind.
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5", ".msgpack", ".onnx")


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A new folder to fill; it takes the name `path` (and another folder's place there) only once it is whole.

    Raises:
        CAPError: the disk is full, or the folder cannot be written; nothing is changed then.
    """
    path = Path(path)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if path.exists() and not path.is_dir():
        raise CAPError(f"{path} is a file: choose another name for the folder")
    try:
        if old.exists() and not path.exists():
            os.rename(old, path)  # a run was killed between the two renames below
        for stale in (partial, old):
            if stale.exists():
                shutil.rmtree(stale)
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
    except (OSError, SafetensorError) as error:
        raise _user_error(path, error) from error
    finally:
        # Also after Ctrl-C: one of the two folders has the name.
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file in one step: a reader sees the old content or the new, never a part.

    Raises:
        CAPError: the disk is full, or the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise _user_error(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_report(folder: str | Path) -> dict:
    """The report of a checkpoint, or an empty one if it has none.

    Raises:
        CAPError: report.json is there and cannot be read.
    """
    path = Path(folder) / REPORT_NAME
    if not path.exists():
        return {}
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CAPError(f"{path} cannot be read: {error}") from error
    if not isinstance(report, dict):
        raise CAPError(f"{path} is not a report: it holds no JSON object")
    return report


def save_checkpoint(
    directory: str | Path,
    model: PreTrainedModel,
    config: CAPConfig | None = None,
    report: dict | None = None,
    image_processor: object | None = None,
    compressed: bool = False,
) -> None:
    """Save a model as safetensors with what belongs to it, atomically; an existing folder is replaced.

    Args:
        directory: where to.
        model: what `from_pretrained` will load.
        config: written as `cap_config.json`.
        report: written as `report.json`.
        image_processor: saved beside the model.
        compressed: store only what is not zero; then `import cap_hf` is needed before `from_pretrained`.

    Raises:
        CAPError: there is too little space, or the folder cannot be written.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with atomic_directory(directory) as folder:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CAPError(f"{directory} needs {needed / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free")
        model.save_pretrained(folder)
        if compressed:
            compress_weights(folder, folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        if config is not None:
            config.save(folder)
        if report is not None:
            write_json(folder / REPORT_NAME, report)


def compress_checkpoint(source: str | Path, directory: str | Path) -> None:
    """Write a compressed copy of a plain checkpoint, atomically; an existing folder is replaced.

    Args:
        source: a folder with a plain checkpoint; everything beside its weights is copied.
        directory: where to.

    Raises:
        CAPError: the source cannot be compressed, the disk is full, or the folder cannot be written.
    """
    source = Path(source)
    if source.resolve() == Path(directory).resolve():
        raise CAPError(f"{directory} is the checkpoint itself: choose another --output_dir")
    with atomic_directory(directory) as folder:
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(path, folder / path.name)
        compress_weights(source, folder)


def _user_error(path: Path, error: OSError | SafetensorError) -> CAPError:
    # safetensors wraps the system's error into a text.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return CAPError(f"the disk of {path} is full: free some space or choose another --output_dir")
    return CAPError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
