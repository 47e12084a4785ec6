"""What of a model sees images, and what it is called with."""

import pytest
import torch
import transformers
from support.backbones import IMAGE, TINY, tiny_clip
from support.models import build
from transformers import BertConfig, BertModel, ViTMAEConfig, ViTMAEForPreTraining, set_seed

from cap_hf.errors import CAPError
from cap_hf.outputs import features_of
from cap_hf.targets import find_targets
from cap_hf.towers import image_shape, is_classifier, prefix_tokens, see, tower_name


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


def test_a_masked_autoencoder_sees_the_whole_image_in_order():
    set_seed(0)
    sizes = {f"decoder_{name}": value for name, value in TINY.items()}
    model = ViTMAEForPreTraining(ViTMAEConfig(**TINY, **IMAGE, **sizes, mask_ratio=0.75)).eval()
    assert tower_name(model) == "vit"
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        first, second = (see(model, {"pixel_values": pixels}) for _ in range(2))
    assert first.last_hidden_state.shape == (2, 5, 16)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert first.ids_restore.tolist() == [[0, 1, 2, 3]] * 2
    assert model.config.mask_ratio == 0.75
    assert all(target.name.startswith("vit.") for target in find_targets(model))


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
