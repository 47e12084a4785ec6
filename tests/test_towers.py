"""What of a model sees images, and what it is called with."""

import pytest
import torch
import transformers
from PIL import Image
from support.backbones import IMAGE, TINY, tiny_clip
from support.families import BACKBONES, CLASSIFIERS
from support.models import build
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DetrConfig,
    DetrForObjectDetection,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput

from cap_hf.errors import CAPError
from cap_hf.outputs import features_of, main_output
from cap_hf.targets import find_targets
from cap_hf.towers import MainOutput, image_shape, is_classifier, prefix_tokens, see, tower_name

# What DETR counts of each of its parts.
PARTS = ("layers", "ffn_dim", "attention_heads")


def test_a_classifier_is_its_own_tower():
    model = build("ViT")
    assert (tower_name(model), is_classifier(model), prefix_tokens(model)) == ("", True, 1)
    pixels = torch.randn(2, 3, 8, 8)
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    assert torch.equal(see(model, batch).logits, model(pixel_values=pixels).logits)


def test_so_is_a_class_that_does_not_say_what_it_takes():
    """transformers then says "text" of it: RegNet's classifier was taken for a backbone."""
    config = transformers.RegNetConfig(depths=[1], hidden_sizes=[8], embedding_size=4, groups_width=4)
    model = transformers.RegNetForImageClassification(config)
    assert tower_name(model) == ""


def test_the_vision_tower_of_a_whole_clip_sees_images_and_alone_is_pruned():
    model = tiny_clip()
    assert (tower_name(model), is_classifier(model), prefix_tokens(model)) == ("vision_model", False, 1)
    assert image_shape(model) == (3, 8, 8)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        outputs = see(model, {"pixel_values": pixels})
        expected = model.get_image_features(pixel_values=pixels)
    assert torch.equal(outputs.pooler_output, expected.pooler_output)
    assert outputs.pooler_output.shape == (2, 8)
    names = [target.name for target in find_targets(model)]
    assert len(names) == 6
    assert all(name.startswith("vision_model.encoder.") for name in names)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        (CLASSIFIERS["SigLIP"], (3, 8, 8)),
        (CLASSIFIERS["CLIP"], (3, 8, 8)),
        (CLASSIFIERS["Hiera"], (3, 32, 32)),
        (BACKBONES["SigLIP"], (3, 8, 8)),
        (BACKBONES["DPT on DINOv2"], (3, 8, 8)),
        (BACKBONES["UperNet on ConvNeXt"], (3, 224, 224)),
    ],
)
def test_the_shape_of_images_is_found_in_the_vision_part_of_a_composite_config(family, shape):
    assert image_shape(family.build()) == shape


def test_where_no_config_has_the_number_of_channels_the_first_convolution_shows_it():
    class Own(PreTrainedModel):
        config_class = PreTrainedConfig
        main_input_name = "pixel_values"

        def __init__(self, config):
            super().__init__(config)
            self.patches = nn.Conv2d(4, 8, 2)

    assert image_shape(Own(PreTrainedConfig(image_size=[12, 16]))) == (4, 12, 16)
    assert image_shape(nn.Linear(2, 2))[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_pixels_are_given_in_the_precision_of_the_model(dtype):
    for model in (build("ViT"), tiny_clip().double()):
        pixels = torch.randn(2, 3, 8, 8).to(dtype)
        found = main_output(see(model, {"pixel_values": pixels}))[1]
        assert torch.equal(found, main_output(see(model, {"pixel_values": pixels.to(model.dtype)}))[1])


def test_a_module_that_takes_no_pixel_values_is_refused():
    with pytest.raises(CAPError, match="Sequential takes no pixel_values: load the model with transformers"):
        see(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"pixel_values": torch.zeros(2, 2)})


@pytest.mark.parametrize("make", [lambda: build("ViT"), tiny_clip])
def test_compilers_follow_in_one_piece(make):
    model = make()
    pixels = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(MainOutput(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels), main_output(see(model, {"pixel_values": pixels}))[1])


def test_a_model_that_only_reads_is_refused():
    model = BertModel(BertConfig(**TINY, vocab_size=10))
    for call in (find_targets, tower_name):
        with pytest.raises(CAPError, match="BertModel takes no images: a vision model is needed"):
            call(model)


@pytest.mark.parametrize(
    ("name", "config", "prefix", "parts"),
    [
        ("Dinov2WithRegisters", {"num_register_tokens": 3}, 4, {"class": 1, "patch": 4, "pooled": 1}),
        ("DINOv3ViT", {"num_register_tokens": 2}, 3, {"class": 1, "patch": 4, "pooled": 1}),
        ("DeiT", {}, 2, {"class": 1, "patch": 4, "pooled": 1}),
        ("SiglipVision", {}, 0, {"patch": 4, "pooled": 1}),
        ("CLIPVision", {}, 1, {"class": 1, "patch": 4, "pooled": 1}),
        ("ViTMSN", {}, 1, {"class": 1, "patch": 4}),
    ],
)
def test_the_features_of_a_backbone(name, config, prefix, parts):
    set_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**TINY, **IMAGE, **config))
    assert (prefix_tokens(model), is_classifier(model)) == (prefix, False)
    with torch.no_grad():
        outputs = see(model.eval(), {"pixel_values": torch.randn(2, 3, 8, 8)})
    features = features_of(outputs, prefix)
    assert {part: each.shape[1] for part, each in features.items()} == parts
    if "class" in parts:
        assert torch.equal(features["class"][:, 0], outputs.last_hidden_state[:, 0])
    assert torch.equal(features["patch"], outputs.last_hidden_state[:, prefix:])


def test_the_mean_that_dinov3_convnext_puts_first_is_no_patch():
    set_seed(0)
    config = DINOv3ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], image_size=64)
    model = DINOv3ConvNextModel(config).eval()
    with torch.no_grad():
        outputs = see(model, {"pixel_values": torch.randn(2, 3, 64, 64)})
    features = features_of(outputs, prefix_tokens(model))
    assert torch.equal(features["class"], features["pooled"])
    assert features["patch"].shape == (2, 4, 8)
    assert torch.equal(features["patch"], outputs.last_hidden_state[:, 1:])


@pytest.mark.parametrize("last", [False, True])
def test_channels_are_found_where_they_are(last):
    class Maps(PreTrainedModel):
        config_class = PreTrainedConfig
        main_input_name = "pixel_values"

        def forward(self, pixel_values):
            return BaseModelOutput(last_hidden_state=pixel_values)

    maps = torch.randn(2, 3, 5, 16) if last else torch.randn(2, 16, 3, 5)
    model = Maps(PreTrainedConfig(hidden_size=16))
    (features,) = features_of(see(model, {"pixel_values": maps})).values()
    expected = maps.flatten(1, 2) if last else maps.flatten(2).mT
    assert torch.equal(features, expected)


def test_places_where_an_image_was_filled_up_say_nothing():
    """SigLIP 2 takes images of any shape as rows of patches, with a mask of those that are filled up."""
    set_seed(0)
    config = Siglip2VisionConfig(**TINY, patch_size=4, num_patches=16, num_channels=3)
    model = Siglip2VisionModel(config).eval()
    made = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)(
        images=[Image.new("RGB", size, "red") for size in ((30, 20), (12, 12))], return_tensors="pt"
    )
    with torch.no_grad():
        features = features_of(see(model, {"labels": torch.zeros(2), **made}), prefix_tokens(model))
    mask = made["pixel_attention_mask"].bool()
    assert not mask.all()
    assert not features["patch"][~mask].any()
    assert features["patch"][mask].any(dim=1).all()


def test_a_decoder_is_no_part_of_the_encoder():
    set_seed(0)
    sizes = {"d_model": 16, "num_queries": 4, "use_pretrained_backbone": False, "use_timm_backbone": False}
    layers = {f"{part}_{name}": 16 if name == "ffn_dim" else 2 for part in ("encoder", "decoder") for name in PARTS}
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"])
    model = DetrForObjectDetection(DetrConfig(**sizes, **layers, backbone_config=backbone, backbone=None))
    names = [target.name for target in find_targets(model)]
    assert any("encoder.layers" in name for name in names)
    assert any("backbone" in name for name in names)
    assert not any("decoder" in name for name in names)
