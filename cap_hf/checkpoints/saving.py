"""Write checkpoints so that a final name never holds half of one."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from cap_hf.checkpoints.atomic import atomic_directory, write_json
from cap_hf.checkpoints.weights import compress_weights
from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError

REPORT_NAME = "report.json"
# Weights in any format: a copy of a checkpoint in another form leaves them behind.
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".h5", ".msgpack", ".onnx")


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
