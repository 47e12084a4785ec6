"""Checkpoints and models whose weights are no plain floats: found, named, and turned into floats to be looked at."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from cap_hf.checkpoints.files import open_safetensors
from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME
from cap_hf.checkpoints.weights import find_weight_files
from cap_hf.errors import CAPError, reason

# As safetensors calls them: entries that stand for something else, or have a part that a model would lose.
NOT_REAL = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64")


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a weight is made of floats: none of a quantisation's tensors, no integers, no bare float8."""
    kind = type(tensor.detach())
    return kind in (torch.Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.element_size() > 1


def quantization_of(model: nn.Module) -> str | None:
    """Return what the weights of a model are quantised with, such as `torchao`; None where all are plain."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not is_plain(parameter):
                kind = type(parameter.detach())
                name = str(parameter.dtype).removeprefix("torch.") if kind is torch.Tensor else kind.__name__
                return stated_method(getattr(model, "config", None)) or name
    return None


def stated_method(config: Any) -> str | None:
    """Return the method that a model's config says its weights are quantised with, if it does."""
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


@torch.no_grad()
def dequantize(model: nn.Module) -> str | None:
    """Turn the quantised weights of a model, in place, into the floats that they stand for; its zeros are then seen.

    Returns:
        What they were quantised with; None where all were plain.

    Raises:
        CAPError: the weights cannot be turned into floats.
    """
    method = quantization_of(model)
    if method is None:
        return None
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if is_plain(parameter):
                continue
            try:
                # A bare float8 has no such method.
                bare = type(parameter.detach()) is torch.Tensor and parameter.is_floating_point()
                floats = parameter.detach().float() if bare else parameter.detach().dequantize()
            except Exception as error:  # each library's own
                raise CAPError(
                    f"{name}.{key} is quantised with {method}, and cannot be turned into floats: {reason(error)}"
                ) from error
            module.register_parameter(key, nn.Parameter(floats, requires_grad=False))
    return method


def check_stored(config: PreTrainedConfig, name_or_path: str | Path, **source: Any) -> None:
    """Raise a CAPError if weights are stored as integers, and the config does not say what these stand for.

    transformers takes such numbers for the weights themselves.

    Args:
        config: of the checkpoint.
        name_or_path: a Hub id of which the files are in the cache, or a folder.
        source: where `from_pretrained` finds it.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        paths = find_weight_files(Path(cached_file(name_or_path, MODEL_CONFIG_NAME, **source) or "").parent).paths
    except Exception:  # the weights have a name of their own, which from_pretrained knows
        return
    for path in paths:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                if name.endswith(".weight") and len(view.get_shape()) > 1 and view.get_dtype() in NOT_REAL:
                    raise CAPError(
                        f"{path} has {name} in the dtype {view.get_dtype()}, and config.json has no "
                        "quantization_config that says what these numbers stand for: save the model in floats"
                    )
