"""The size of an example is that of the images which a model is used with, whoever says it."""

import pytest
import torch
from support.backbones import TINY, tiny_clip, tiny_dinov2
from support.families import CLASSIFIERS
from support.models import TINY_VIT, build
from torch import nn
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    ViTImageProcessorPil,
)

from cap_hf.errors import CAPError
from cap_hf.inference.example import make_example, size_of

CROP = {"crop_size": {"height": 12, "width": 16}}


def patches_model():
    return Siglip2VisionModel(Siglip2VisionConfig(**TINY, patch_size=4, num_patches=16, num_channels=3))


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (BitImageProcessorPil(size={"shortest_edge": 18}, **CROP), (12, 16)),
        (CLIPImageProcessorPil(size={"shortest_edge": 18}, **CROP), (12, 16)),
        # Cuts more off the smaller the images are.
        (ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875), (28, 28)),
        (BitImageProcessorPil(size={"shortest_edge": 18}, do_center_crop=False), (18, 18)),
        (ViTImageProcessorPil(size={"height": 24, "width": 12}), (24, 12)),
        # Images stay as large as they are: the config says.
        (ViTImageProcessorPil(do_resize=False), (8, 8)),
        (None, (8, 8)),
    ],
)
def test_the_image_processor_decides_the_size(processor, size):
    model = tiny_dinov2()
    inputs = make_example(model, 2, processor)
    assert {name: value.shape for name, value in inputs.items()} == {"pixel_values": (2, 3, *size)}
    assert size_of(model, inputs) == size
    assert make_example(model, 1, processor, 16)["pixel_values"].shape == (1, 3, 16, 16)
    assert make_example(model, 1, processor, (12, 8))["pixel_values"].shape == (1, 3, 12, 8)


@pytest.mark.parametrize(
    ("arguments", "patches", "size"),
    [
        ({}, 16, (16, 16)),
        ({"image_size": (8, 24)}, 12, (8, 24)),
        # Four of 20 rows are filled up.
        ({"image_processor": Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20)}, 20, (16, 16)),
    ],
)
def test_rows_of_patches_have_a_size_too(arguments, patches, size):
    model = patches_model()
    inputs = make_example(model, 2, **arguments)
    assert inputs["pixel_values"].shape == (2, patches, 48)
    assert int(inputs["pixel_attention_mask"].sum()) == 2 * size[0] * size[1] // 16
    assert size_of(model, inputs) == size
    assert model(**inputs).last_hidden_state.shape[:2] == (2, patches)


@pytest.mark.parametrize(("name", "size"), [("SigLIP", (8, 8)), ("CLIP", (8, 8)), ("Hiera", (32, 32))])
def test_a_model_takes_its_example(name, size):
    model = CLASSIFIERS[name].build()
    inputs = make_example(model, 2)
    assert size_of(model, inputs) == size
    assert model(**inputs).logits.shape[0] == 2


def test_the_dtype_and_channels_are_the_models():
    grey = build("ViT", **TINY_VIT).half()
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    pixels = make_example(grey, 1, processor)["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((1, 1, 8, 8), torch.float16)


def test_what_cannot_be_known_is_one_line():
    grey, model = build("ViT", **TINY_VIT), tiny_clip()
    colours = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    with pytest.raises(CAPError, match="BitImageProcessorPil gives images of 3 channels, and ViTForImage.* takes 1: "):
        make_example(grey, 1, colours)
    with pytest.raises(CAPError, match="ViTImageProcessorPil cannot process a blank image: .*image_size"):
        make_example(model, 1, ViTImageProcessorPil(image_mean=[0.5, 0.5]))
    with pytest.raises(CAPError, match="Linear does not say how many channels its images have: pass example_inputs"):
        make_example(nn.Linear(2, 2))
    for size in (0, (1, 2, 3), (8, -8), (), "8"):
        with pytest.raises(CAPError, match=r"image_size=.* is no size: one number is, or two"):
            make_example(model, 1, None, size)
