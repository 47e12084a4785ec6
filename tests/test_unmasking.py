"""A masked autoencoder sees all of an image, in order, and masks again afterwards."""

import torch
from support.backbones import IMAGE, TINY
from support.families import HIERA, Family
from transformers import HieraModel, ViTMAEConfig, ViTMAEForPreTraining, set_seed

from cap_hf.targets import find_targets
from cap_hf.towers import see, tower_name
from cap_hf.unmasking import unmasked


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


def test_hiera_for_pretraining_sees_the_whole_image_too():
    """Its embeddings have a copy of the config's ratio."""
    model = Family(
        "HieraForPreTraining", {**HIERA, "decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 2}, 32, 0
    ).build()
    whole = HieraModel(model.config, add_pooling_layer=False).eval()
    whole.load_state_dict(model.hiera.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = see(model, {"pixel_values": pixels}).last_hidden_state
        assert torch.equal(found, whole(pixel_values=pixels).last_hidden_state)
        assert model.hiera.embeddings.patch_embeddings.mask_ratio == model.config.mask_ratio > 0


def test_a_model_without_masks_is_left_alone():
    with unmasked(torch.nn.Linear(2, 2)) as noise:
        assert noise is None
