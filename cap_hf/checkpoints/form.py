"""The form that a checkpoint's weights are stored in, their dtype and the size of their files, which pruning keeps.

Gradients need float32, so a model in half precision is loaded in it, changed, rounded to what will be stored before it
is measured, and saved in the dtype and in files of the size that it came in. Weights of several dtypes are all saved in
float32, so that no part of a model loses what it had.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.utils import cached_file

from cap_hf.checkpoints.files import check_file
from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, read_json
from cap_hf.checkpoints.weights import find_weight_files
from cap_hf.errors import CAPError, reason

logger = logging.getLogger(__name__)

# As the header of a safetensors file calls them.
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
FULL = {"F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class StoredForm:
    """How weights are stored.

    Attributes:
        dtype: of the floating point weights and buffers; None for the model's own.
        max_shard_size: bytes of the tensors in one file before they are compressed, or such as "5GB"; None for
            transformers' default.
    """

    dtype: torch.dtype | None = None
    max_shard_size: int | str | None = None


def stored_form(folder: str | Path, model: nn.Module | None = None) -> StoredForm:
    """Return how the weights of a checkpoint folder are stored, for a model that is in float32: in shards or not.

    In half precision only if all are that from_pretrained does not keep in float32; else a line says what is lost.

    Args:
        folder: with the weights.
        model: that was loaded from it; None if it keeps nothing in float32.

    Raises:
        CAPError: there are no safetensors weights, or a file is damaged.
    """
    files = find_weight_files(folder)
    contents = [check_file(path) for path in files.paths]
    largest = max(each.dense_bytes for each in contents) if len(contents) > 1 else None
    dtypes = {name: dtype for each in contents for name, dtype in each.dtypes.items()}
    for name, half in HALVES.items():
        kept = kept_in_float32(model, half)
        if {dtype for key, dtype in dtypes.items() if dtype != "F32" or not (kept and kept.search(key))} == {name}:
            return StoredForm(half, largest)
    found = set(dtypes.values())
    if found - {"F32"}:
        known = HALVES | FULL
        kinds = " and ".join(str(known.get(each, each)).removeprefix("torch.") for each in sorted(found))
        loss = "rounds float64" if "F64" in found else "loses nothing"
        logger.warning("%s has weights in %s: they are used and saved in float32, which %s", folder, kinds, loss)
    return StoredForm(None, largest)


def find_form(name_or_path: str, model: nn.Module | None = None, **source: Any) -> StoredForm:
    """Return how the weights of a checkpoint are stored that was loaded: of a folder, or out of the cache.

    Args:
        name_or_path: a Hub id, or a folder.
        model: as `stored_form` takes it.
        source: where `from_pretrained` found it: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CAPError: as `stored_form`.
    """
    try:
        config = Path(str(cached_file(name_or_path, MODEL_CONFIG_NAME, **source)))
    except Exception as error:  # network, rights
        raise CAPError(f"{name_or_path} has no {MODEL_CONFIG_NAME}: {reason(error)}") from error
    try:
        return stored_form(config.parent, model)
    except CAPError:
        if Path(name_or_path).is_dir():
            raise
    # transformers took the weights from another revision, where the Hub had converted them.
    values = read_json(config)
    dtype = getattr(torch, str(values.get("dtype") or values.get("torch_dtype")), None)
    return StoredForm(dtype if dtype in HALVES.values() else None)


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Round all weights and buffers, in place, to what a dtype holds; they keep the dtype that they have.

    Zeros stay, and what is too small for the dtype becomes 0, of no sign.

    Args:
        model: in a wider dtype.
        dtype: None to leave everything as it is.

    Raises:
        CAPError: a value is too large for the dtype; nothing is changed then.
    """
    if dtype is None:
        return
    check_range(too_large(model, dtype))
    for _, tensor, wanted in stored_dtypes(model, dtype):
        if tensor.dtype != wanted:
            rounded = tensor.to(wanted)
            rounded.masked_fill_((rounded == 0) & (tensor != 0), 0)
            tensor.copy_(rounded)


@torch.no_grad()
def too_large(
    model: nn.Module,
    dtype: torch.dtype | None,
    replaced: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> str:
    """Return which weight of a model does not fit into a dtype; "" where all do. Infinite ones were there before.

    Args:
        model: in a wider dtype.
        dtype: None for the model's own.
        replaced: from a weight to what will be in its place.
    """
    for name, tensor, wanted in () if dtype is None else stored_dtypes(model, dtype):
        values = replaced(tensor) if tensor.dtype != wanted else tensor
        largest = values.masked_fill(~values.isfinite(), 0).abs().max() if values.numel() else values.new_zeros(())
        if not largest.to(wanted).isfinite():
            return f"{name} holds {largest.item():g}, too much for {wanted}, which the checkpoint is stored in"
    return ""


def check_range(wrong: str) -> None:
    """Raise a CAPError if `too_large` has found a weight."""
    if wrong:
        raise CAPError(f"{wrong}: store it in bfloat16 or float32 first")


def fitting_form(form: StoredForm, model: nn.Module) -> StoredForm:
    """Return a form that holds all weights of a model: in float32, with a warning, where half precision does not."""
    wrong = too_large(model, form.dtype)
    if not wrong:
        return form
    logger.warning("%s: it is saved in float32 instead", wrong)
    return replace(form, dtype=None)


@contextmanager
def stored_in(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the context a model has its weights and buffers in a dtype, as its config says, and can be saved in it.

    Args:
        model: of transformers.
        dtype: None to leave everything as it is.
    """
    if dtype is None:
        yield
        return
    with ExitStack() as stack:
        for config in (model.config, *sub_configs(model.config)):
            stack.callback(setattr, config, "dtype", config.dtype)
            config.dtype = dtype
        for _, tensor, wanted in list(stored_dtypes(model, dtype)):
            # As torch's own `Module.to` does, so that shared weights stay shared.
            stack.callback(setattr, tensor, "data", tensor.data)
            tensor.data = tensor.data.to(wanted)
        yield


def stored_dtypes(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Yield each floating point weight and buffer that is saved, with the dtype that `from_pretrained` gives it.

    Some models keep a few modules in float32 whatever dtype they are loaded in.
    """
    kept = kept_in_float32(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            yield name, tensor, torch.float32 if kept is not None and kept.search(name) else dtype


def kept_in_float32(model: nn.Module | None, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return what is found in the names of weights that from_pretrained keeps in float32; None where it keeps none."""
    # What it goes by (transformers 5.20 to 5.23).
    plan = model._get_dtype_plan(dtype) if isinstance(model, PreTrainedModel) else {}
    return build_glob_alternation(list(plan))[0] if plan else None


def sub_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configs in a config, such as those of the towers of CLIP."""
    found = [getattr(config, name, None) for name in config.sub_configs]
    own = [each for each in found if isinstance(each, PreTrainedConfig)]
    return own + [deeper for each in own for deeper in sub_configs(each)]
