"""A checkpoint as a model: the folder it lies in, and the model in it, whole or not at all."""

import inspect
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import cached_files

from cap_hf.checkpoints.explaining import (
    explain,
    explain_adapter,
    explain_mismatch,
    explain_missing,
    missing_package,
)
from cap_hf.checkpoints.files import check_file
from cap_hf.checkpoints.folder import COMPANIONS, check_inside, check_model_config, read_json
from cap_hf.checkpoints.location import check_location
from cap_hf.checkpoints.places import closed_cache
from cap_hf.checkpoints.quantized import check_stored
from cap_hf.checkpoints.weights import WeightFiles, find_weight_files
from cap_hf.errors import CAPError, reason
from cap_hf.models import check_finite
from cap_hf.notices import only_errors
from cap_hf.targets import summarize

logger = logging.getLogger(__name__)

# The arguments of `from_pretrained` that say where a checkpoint lies.
WHERE = ("revision", "cache_dir", "token", "local_files_only", "subfolder")


def local_folder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, token: str | None = None
) -> Path:
    """Return a folder as it is, or that of a Hub checkpoint, which is downloaded into the cache.

    Raises:
        CAPError: there is no such folder and no such checkpoint within reach.
    """
    check_location(name_or_path)
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        folder = snapshot_download(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            allow_patterns=["*.json", "*.safetensors", "*.py", "*.txt", "*.model", "*.md", "*.png"],
        )
    except Exception as error:  # network, rights, a name that is none
        said = f"{name_or_path} is no folder and cannot be downloaded: {reason(error)}"
        raise closed_cache(error, cache_dir) or CAPError(said) from error
    return Path(folder)


def find_companions(name_or_path: str | Path, **source: Any) -> list[Path]:
    """Return the files that belong to a checkpoint beside its weights and its image processor, such as a tokenizer's.

    Args:
        name_or_path: a Hub id, or a folder.
        source: where `from_pretrained` finds it: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CAPError: the Hub does not give them, or one is a link out of its folder or is called JSON and is none.
    """
    try:
        found = cached_files(name_or_path, list(COMPANIONS), _raise_exceptions_for_missing_entries=False, **source)
    except Exception as error:  # network, rights
        raise CAPError(f"{name_or_path} cannot be asked for its tokenizer: {reason(error)}") from error
    paths = [Path(path) for path in found or ()]
    # What could not be copied in the end is found before the work begins.
    for path in paths:
        check_inside(path, path.parent)
        if path.suffix == ".json":
            read_json(path)
    return paths


def check_folder(folder: str | Path, trust_remote_code: bool = False) -> WeightFiles:
    """Return the weight files of a checkpoint that can be loaded as far as its config and its files' headers tell.

    transformers makes up weights that a file lacks before it says so, and a config may ask for any number of them.

    Raises:
        CAPError: config.json or a weight file is missing or damaged, or they contradict each other.
    """
    files = find_weight_files(folder)
    contents = [check_file(path) for path in files.paths]
    check_model_config(folder, sum(len(each.names) for each in contents))
    try:
        model = build_empty(folder, trust_remote_code)
    except Exception as error:  # configuration, foreign code
        raise CAPError(explain(folder, error)) from error
    asked, stored = model.num_parameters(), sum(each.num_entries for each in contents)
    # What is lacking in part is named when the model is loaded.
    if asked > 2 * stored:
        raise CAPError(f"{folder} has a config.json for {asked:,} parameters, and weights for {stored:,}")
    return files


def build_empty(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model that a checkpoint's config asks for, on the meta device, where weights take no memory."""
    with only_errors(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        kind = model_class(config, trust_remote_code)
        # Not in the config's dtype, of which there may be no random numbers.
        if issubclass(kind, PreTrainedModel):
            return kind._from_config(config, dtype=torch.float32)
        return kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def check_names(folder: str | Path, trust_remote_code: bool = False) -> None:
    """Raise the CAPError of `load_checkpoint` about weights that are lacking or of another name or shape; read none.

    Of a model that cannot be built here, for want of a package or of leave to run its code, the weights cannot be
    checked: a line says so.
    """
    try:
        check_folder(folder, trust_remote_code)
    except CAPError as error:
        said = "" if error.__cause__ is None else reason(error.__cause__)
        if missing_package(said) is None and "trust_remote_code=True" not in said:
            raise
        logger.warning("It was not checked whether all weights are there: %s", error)
        return
    load_checkpoint(folder, trust_remote_code, device_map="meta")


def model_class(config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """Return what loads a checkpoint: the class that its config names, or an Auto class where it names none.

    Args:
        config: of the checkpoint.
        trust_remote_code: whether a class may come from code that the checkpoint brings along.
    """
    own_code = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForImageClassification, AutoModel, AutoBackbone):
        if trust_remote_code and auto.__name__ in own_code:
            return auto
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModelForImageClassification if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING else AutoModel


def load_checkpoint(
    name_or_path: str | Path, trust_remote_code: bool = False, dtype: str = "auto", **source: Any
) -> PreTrainedModel:
    """Return the model of a checkpoint, whole: a weight that it lacks is an error, not a random one.

    Its class is the one that the config names: an image classifier, a backbone, a model with a vision tower. A pooler
    that the checkpoint has no weights for is left out, where the class does without.

    Args:
        name_or_path: a Hub id, or a folder; if it was received from somebody, one that `check_folder` has passed.
        trust_remote_code: run the code that the checkpoint brings along; nobody is asked.
        dtype: of the weights, such as `float32`; `auto` for the one they are stored in.
        source: what else `from_pretrained` takes, such as `revision` and `token`.

    Raises:
        CAPError: it cannot be loaded, lacks weights, or has some that are not finite.
    """
    check_location(name_or_path)
    arguments = source | {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    try:
        with only_errors():
            where = {name: source[name] for name in WHERE if name in source}
            if find_adapter_config_file(str(name_or_path), **where) is not None:
                # Without PEFT transformers would load what is beside the adapter, and say nothing.
                raise CAPError(explain_adapter(name_or_path))
            config = AutoConfig.from_pretrained(name_or_path, **source, trust_remote_code=trust_remote_code)
            kind = model_class(config, trust_remote_code)
            model, info = kind.from_pretrained(name_or_path, **arguments)
            unpooled = "add_pooling_layer" in inspect.signature(type(model)).parameters
            if info["missing_keys"] and unpooled and all("pooler" in name for name in info["missing_keys"]):
                model, info = kind.from_pretrained(name_or_path, **arguments, add_pooling_layer=False)
            check_stored(config, name_or_path, **source)
    except CAPError:
        raise
    except Exception as error:  # configuration, file format, foreign code
        raise closed_cache(error, source.get("cache_dir")) or CAPError(explain(name_or_path, error)) from error
    if info["missing_keys"]:
        raise CAPError(explain_missing(name_or_path, model, info["missing_keys"], info["unexpected_keys"]))
    if info["mismatched_keys"]:
        raise CAPError(explain_mismatch(name_or_path, model, list(info["mismatched_keys"])))
    check_finite(model)
    if info["unexpected_keys"]:
        unused = summarize(sorted(info["unexpected_keys"]), 3)
        logger.warning("%s has weights that %s does not use: %s", name_or_path, type(model).__name__, unused)
    return model
