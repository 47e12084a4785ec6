"""The example that a model is tried with: pixels of the size that it is used with.

How large the images are that a model is used with, its image processor decides. Its config tells of the pretraining: a
DINOv2 was pretrained with 518 pixels, and is used with 224.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

from cap_hf.checkpoints.processors import near_image_processor
from cap_hf.errors import CAPError, reason
from cap_hf.towers import image_shape, patch_size, tower_of

# What a model is called with: `pixel_values`, and what else it takes to know them.
Inputs = dict[str, torch.Tensor]
# Sides of the blank images that an image processor is given. Where the two come out alike, it decides the size.
SIDES = (320, 512)


def make_example(
    model: nn.Module,
    batch_size: int = 1,
    image_processor: BaseImageProcessor | None = None,
    image_size: int | Sequence[int] | None = None,
) -> Inputs:
    """Return random `pixel_values` of the size that a model is used with, and what it takes beside rows of patches.

    Args:
        model: of transformers, or another module that says or shows how many channels its images have.
        batch_size: images.
        image_processor: that decides their size; default: the one beside the checkpoint that the model was loaded
            from, if there is one within reach.
        image_size: height and width in pixels, or one number for both, in the place of what the image processor says.
            Where there is neither, or the processor leaves images as large as they are, the config says it.

    Returns:
        `pixel_values` `(batch, channels, height, width)`, on the model's device and in its dtype. Of a model that takes
        rows of patches (SigLIP 2) they are `(batch, patches, channels * side * side)`, with a mask and their shapes.

    Raises:
        CAPError: the size is none, the processor cannot be run or gives another number of channels than the model
            takes, or nothing says how many these are.
    """
    channels, height, width = image_shape(model)
    if not channels:
        raise CAPError(
            f"{type(model).__name__} does not say how many channels its images have: pass example_inputs to "
            "optimize_for_inference, or set num_channels in its config"
        )
    made: Inputs | None = None
    if image_size is not None:
        height, width = check_size(image_size)
    else:
        image_processor = image_processor or near_image_processor(model)
        made = None if image_processor is None else process_blank(image_processor, model, channels)
    if made is None:
        made = blank_inputs(model, channels, height, width)
    generator = torch.Generator().manual_seed(0)
    parameter = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    inputs = {name: value[:1].expand(batch_size, *value.shape[1:]) for name, value in made.items()}
    pixels = torch.randn(inputs["pixel_values"].shape, generator=generator).to(parameter.dtype)
    return {name: value.to(parameter.device) for name, value in (inputs | {"pixel_values": pixels}).items()}


def check_example(inputs: object, model: nn.Module) -> None:
    """Raise a CAPError if what is given as an example's inputs cannot be what a model is called with.

    Args:
        inputs: `pixel_values`, or for a module that takes none whatever it takes, by name.
        model: that is to be called.
    """
    if not isinstance(inputs, Mapping):
        raise CAPError(f"example_inputs is of type {type(inputs).__name__}: pass a dict, {{'pixel_values': tensor}}")
    if "pixel_values" not in inspect.signature(tower_of(model).forward).parameters:
        return
    if not isinstance(pixels := inputs.get("pixel_values"), torch.Tensor):
        given = f"it has {', '.join(map(str, inputs)) or 'nothing'}" if pixels is None else type(pixels).__name__
        raise CAPError(f"example_inputs has no tensor for 'pixel_values' ({given}): pass {{'pixel_values': tensor}}")


def check_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return a size as height and width.

    Raises:
        CAPError: it is neither one number nor two, or one is not positive.
    """
    numbers = list(image_size) if isinstance(image_size, Sequence) else [image_size]
    if len(numbers) not in (1, 2) or not all(isinstance(each, int) and each > 0 for each in numbers):
        raise CAPError(f"image_size={image_size!r} is no size: one number is, or two, height and width")
    return numbers[0], numbers[-1]


def process_blank(image_processor: Any, model: nn.Module, channels: int) -> Inputs | None:
    """Return what an image processor makes of a blank image, as far as a model takes it; errors as of `make_example`.

    Returns:
        None where what it makes is as large as the image is.
    """
    # A processor of several modalities has one of images.
    image_processor = getattr(image_processor, "image_processor", None) or image_processor
    found = []
    for side in SIDES:
        blank = Image.new("L" if channels == 1 else "RGB", (side, side))
        try:
            found.append(dict(image_processor(images=[blank], return_tensors="pt")))
            shape = found[-1]["pixel_values"].shape
        except Exception as error:  # processors are many, and check little
            raise CAPError(
                f"{type(image_processor).__name__} cannot process a blank image: {reason(error)}; mend its settings, "
                "or say how large images are with image_size"
            ) from error
        if len(shape) == 4 and shape[1] != channels:
            raise CAPError(
                f"{type(image_processor).__name__} gives images of {shape[1]} channels, and {type(model).__name__} "
                f"takes {channels}: mend its settings, or say how large images are with image_size"
            )
    first, made = found
    if first["pixel_values"].shape != made["pixel_values"].shape:
        return None
    if made["pixel_values"].dim() == 4:
        # What comes with images says where they were filled up, which a blank square is not.
        return {"pixel_values": made["pixel_values"]}
    taken = inspect.signature(tower_of(model).forward).parameters
    return {name: value for name, value in made.items() if name in taken and isinstance(value, torch.Tensor)}


def blank_inputs(model: nn.Module, channels: int, height: int, width: int) -> Inputs:
    """Return what a model takes for one blank image of a size."""
    if "spatial_shapes" not in inspect.signature(tower_of(model).forward).parameters:
        return {"pixel_values": torch.zeros(1, channels, height, width)}
    side = patch_size(model)
    rows, columns = max(height // side, 1), max(width // side, 1)
    return {
        "pixel_values": torch.zeros(1, rows * columns, channels * side * side),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]]),
    }


def size_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return the height and width, in pixels, of the (first) image in a model's inputs."""
    if "spatial_shapes" in inputs:
        rows, columns = inputs["spatial_shapes"][0].tolist()
        return rows * patch_size(model), columns * patch_size(model)
    height, width = inputs["pixel_values"].shape[-2:]
    return height, width
