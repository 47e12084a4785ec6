"""What of a model sees images: the model itself, or the vision tower of a larger one."""

import inspect
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from cap_hf.errors import CAPError
from cap_hf.failures import explained
from cap_hf.outputs import main_output, other_task
from cap_hf.unmasking import unmasked

# Parameters that stand for one token before those of the image.
PREFIX_PARAMETERS = ("cls_token", "class_embedding", "class_token", "distillation_token", "dist_token")


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model is an image classifier, by the name of its class or of one that it inherits from."""
    return any("ForImageClassification" in kind.__name__ for kind in type(model).__mro__)


def picks_label(model: nn.Module) -> bool:
    """Return whether a model is an image classifier that picks one label of several, which accuracies are for."""
    return is_classifier(model) and other_task(model) is None


def tower_name(model: nn.Module) -> str:
    """Return the name of the module in a model that sees images, such as `vision_model`; "" for the model itself.

    Raises:
        CAPError: no part of it takes images.
    """
    modalities = getattr(model, "input_modalities", "image")
    modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    # ("text",) is what transformers says of a class that says nothing of itself, such as RegNet's.
    sees = modalities in (("image",), ("text",))
    if not isinstance(model, PreTrainedModel) or (sees and takes_pixels(model)):
        # Trained to fill in what was masked: what is used of it afterwards is the encoder, which sees everything.
        base = getattr(model, "base_model_prefix", "")
        pretraining = "ForPreTraining" in type(model).__name__ or "MaskedImageModeling" in type(model).__name__
        return base if pretraining and hasattr(model, base) else ""
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and takes_pixels(module):
            return name
    raise CAPError(f"{type(model).__name__} takes no images: a vision model is needed, or one that has a vision tower")


def takes_pixels(model: PreTrainedModel) -> bool:
    """Return whether a model is called with `pixel_values` alone."""
    return model.main_input_name == "pixel_values"


def tower_of(model: nn.Module) -> nn.Module:
    """Return the module in a model that sees images; errors as of `tower_name`."""
    return model.get_submodule(tower_name(model))


def vision_config(model: nn.Module) -> PretrainedConfig | None:
    """Return the config of the part that sees images, or None where a module has none."""
    return getattr(tower_of(model), "config", None)


def vision_configs(model: nn.Module) -> list[Any]:
    """Return the configs that tell of the images of a model: its backbone's, its tower's, those of parts of the tower.

    A composite model, such as SigLIP's classifier, has what there is to know in the config of its vision part.
    """
    tower = tower_of(model)
    configs = [getattr(module, "config", None) for module in tower.modules()]
    configs = [getattr(configs[0], "backbone_config", None), *configs]
    return [*{id(config): config for config in configs if config is not None}.values()]


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return the channels, height and width of the images that a model's configs tell of; 0 channels where none does.

    Fully convolutional models take any size, and most are used with 224. Where no config has the number of channels,
    the first convolution shows it.
    """
    configs = vision_configs(model)
    timm = first_of(configs, "pretrained_cfg") or {}
    if "input_size" in timm:
        height, width = timm["input_size"][1:]
    else:
        size = first_of(configs, "image_size")
        if size is None:
            patches, side = first_of(configs, "num_patches"), patch_size(model)
            size = math.isqrt(patches) * side if patches and side else 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
    convolution = next((module for module in tower_of(model).modules() if isinstance(module, nn.Conv2d)), None)
    shown = convolution.in_channels if convolution is not None else 0
    return channels_in(configs) or shown, height, width


def channels_in(configs: Iterable[Any]) -> int:
    """Return how many channels the images of a model have, by some configs; 0 where none says."""
    configs = list(configs)
    timm = first_of(configs, "pretrained_cfg") or {}
    return timm["input_size"][0] if "input_size" in timm else first_of(configs, "num_channels") or 0


def patch_size(model: nn.Module) -> int:
    """Return the side of a patch, in pixels, of a model whose config has one."""
    size = first_of(vision_configs(model), "patch_size")
    return size[0] if isinstance(size, (list, tuple)) else size


def first_of(configs: Iterable[Any], name: str) -> Any:
    """Return the first value that is not None or 0 of those that some configs have by a name; None if none has."""
    return next((getattr(config, name) for config in configs if getattr(config, name, None)), None)


def taken_by(tower: nn.Module) -> set[str]:
    """Return what the part of a model that sees images can be called with, by name: `pixel_values`, and others."""
    parameters = inspect.signature(tower.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return {*parameters} | ({"pixel_values"} if takes_any else set())


def see(model: nn.Module, batch: Mapping[str, torch.Tensor], through: nn.Module | None = None, **options: Any) -> Any:
    """Return what a model makes of images: its outputs, those of its vision tower where it also reads something else.

    What a tower pools is projected as its model does it (CLIP, arXiv 2103.00020, section 2.3). Models that were trained
    on masked images see all of each image, in the order of its patches (arXiv 2111.06377, section 3).

    Args:
        model: of transformers, or any module that takes `pixel_values`.
        batch: what it is called with, `pixel_values` and what else its image processor makes; labels are left out.
            Floating-point numbers of another precision are made those of the model.
        through: what is called in place of the tower, such as a wrapper of it that sums gradients over processes.
        options: further arguments, such as `output_hidden_states`.

    Raises:
        CAPError: no part of the model takes images, they are whole numbers, or the model fails on them.
    """
    tower = tower_of(model)
    # An image processor may make more than its model takes.
    taken = taken_by(tower)
    if "pixel_values" in batch and "pixel_values" not in taken:
        raise CAPError(
            f"{type(tower).__name__} takes no pixel_values: load the model with transformers, such as "
            "AutoModelForImageClassification.from_pretrained(...), which has timm's models too"
        )
    inputs = {name: value for name, value in batch.items() if name in taken}
    inputs.pop("labels", None)
    inputs = in_precision_of(tower, inputs)
    # What a compiler or an exporter follows is not to be caught.
    explaining = nullcontext() if torch.compiler.is_compiling() else explained(tower, inputs, image_shape)
    with unmasked(tower) as noise, explaining:
        if noise is not None:
            inputs["noise"] = noise(inputs["pixel_values"])
        call = tower if through is None else through
        outputs = call(**inputs, **options)
    tokens = getattr(outputs, "last_hidden_state", None)
    if isinstance(tokens, torch.Tensor) and is_channels_last(tower, tokens):
        outputs["last_hidden_state"] = tokens.permute(0, 3, 1, 2)
    mask = batch.get("pixel_attention_mask")
    if mask is not None and isinstance(tokens, torch.Tensor) and tokens.shape[:2] == mask.shape:
        # What stands where an image was filled up says nothing.
        outputs["last_hidden_state"] = tokens * mask[..., None].to(tokens.dtype)
    project = getattr(model, "visual_projection", None)
    if tower is not model and isinstance(project, nn.Linear) and getattr(outputs, "pooler_output", None) is not None:
        outputs["pooler_output"] = project(outputs["pooler_output"])
    return outputs


def in_precision_of(tower: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with pixels in a model's own precision: those of NumPy come in float64.

    Raises:
        CAPError: the pixels are whole numbers, which nothing has scaled and normalised.
    """
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, torch.Tensor):
        return dict(inputs)
    if not pixels.is_floating_point():
        raise CAPError(
            f"pixel_values are {pixels.dtype}, as an image has them: give what the model's image processor makes of "
            "images, scaled and normalised"
        )
    dtype = next((each.dtype for each in tower.parameters() if each.is_floating_point()), pixels.dtype)
    return dict(inputs) | {"pixel_values": pixels.to(dtype)}


def is_channels_last(tower: nn.Module, tokens: torch.Tensor) -> bool:
    """Return whether a map of features is `(b, h, w, d)`, as of timm's Swin and some Hieras, not `(b, d, h, w)`."""
    if tokens.dim() != 4:
        return False
    timm = getattr(tower, "timm_model", None)
    if timm is not None:
        return "NHWC" in str(getattr(timm, "output_fmt", ""))
    width = getattr(getattr(tower, "config", None), "hidden_size", None)
    return width is not None and tokens.shape[-1] == width != tokens.shape[1]


class MainOutput(nn.Module):
    """A model as a function: pixels in, and what it takes to know them; logits or what else it is called for out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Compilers follow a plain call more easily.
        self.plain = tower_of(model) is model and getattr(vision_config(model), "mask_ratio", None) is None

    def forward(self, pixel_values: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        """Return `(b, ...)` of pixels `(b, channels, height, width)`; errors as of `see` and `main_output`."""
        batch = {"pixel_values": pixel_values, **others}
        return main_output(self.model(**batch) if self.plain else see(self.model, batch))[1]


def prefix_tokens(model: nn.Module) -> int:
    """Return how many tokens a model puts before those of an image: class, distillation and register tokens.

    Only transformers that keep them in their outputs count: those with a parameter for one.
    """
    tower = tower_of(model)
    timm = getattr(tower, "timm_model", None)
    if timm is not None:
        return int(getattr(timm, "num_prefix_tokens", 0))
    if getattr(getattr(tower, "config", None), "model_type", None) == "dinov3_convnext":
        return 1  # the mean of its positions, which it puts before them
    names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    found = sum(name in names for name in PREFIX_PARAMETERS)
    registers = getattr(getattr(tower, "config", None), "num_register_tokens", 0) or 0
    return found + registers if found else 0
