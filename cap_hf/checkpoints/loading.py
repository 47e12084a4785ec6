"""A checkpoint as a model: the folder it lies in, and the classifier in it, whole or not at all."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoModelForImageClassification, PreTrainedModel

from cap_hf.checkpoints.files import check_file
from cap_hf.checkpoints.folder import check_model_config
from cap_hf.checkpoints.weights import WeightFiles, find_weight_files
from cap_hf.errors import CAPError, reason


def local_folder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Path:
    """Return a folder as it is, or that of a Hub checkpoint, which is downloaded into the cache.

    Raises:
        CAPError: there is no such folder and no such checkpoint within reach.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        folder = snapshot_download(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=["*.json", "*.safetensors", "*.py", "*.txt", "*.md", "*.png"],
        )
    except Exception as error:  # network, rights, a name that is none
        raise CAPError(f"{name_or_path} is no folder and cannot be downloaded: {reason(error)}") from error
    return Path(folder)


def check_folder(folder: str | Path) -> WeightFiles:
    """Return the weight files of a checkpoint whose config and files can be read, before transformers reads them.

    Raises:
        CAPError: config.json or a weight file is missing or damaged, or they contradict each other.
    """
    files = find_weight_files(folder)
    check_model_config(folder, sum(len(check_file(path).names) for path in files.paths))
    return files


def load_classifier(folder: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Return the image classifier of a checkpoint folder in the dtype that it is stored in, whole.

    Args:
        folder: of the checkpoint.
        trust_remote_code: run the code that the checkpoint brings along; nobody is asked.
        kwargs: for `from_pretrained`.

    Raises:
        CAPError: it cannot be loaded or lacks weights.
    """
    check_folder(folder)
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder,
            **{"dtype": "auto", "use_safetensors": True, **kwargs},
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # configuration, file format, foreign code
        raise CAPError(f"{folder} cannot be loaded: {reason(error)}") from error
    lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lost:
        raise CAPError(f"{folder} has no weights for {lost[0]}, and {len(lost) - 1} more")
    return model
