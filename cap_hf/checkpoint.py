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

from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError

REPORT_NAME = "report.json"


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
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise _user_error(path, error) from error
    finally:
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


def save_checkpoint(
    directory: str | Path,
    model: PreTrainedModel,
    config: CAPConfig | None = None,
    report: dict | None = None,
    image_processor: object | None = None,
) -> None:
    """Save a model as plain safetensors with what belongs to it, atomically; an existing folder is replaced.

    Args:
        directory: where to.
        model: what `from_pretrained` will load.
        config: written as `cap_config.json`.
        report: written as `report.json`.
        image_processor: saved beside the model.

    Raises:
        CAPError: there is too little space, or the folder cannot be written.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with atomic_directory(directory) as folder:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CAPError(f"{directory} needs {needed / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free")
        model.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        if config is not None:
            config.save(folder)
        if report is not None:
            write_json(folder / REPORT_NAME, report)


def _user_error(path: Path, error: OSError | SafetensorError) -> CAPError:
    # safetensors wraps the system's error into a text.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return CAPError(f"the disk of {path} is full: free some space or choose another --output_dir")
    return CAPError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
