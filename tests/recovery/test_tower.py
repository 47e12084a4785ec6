"""Calling a model while its tower is trained calls the tower; afterwards nothing is different."""

import inspect

import pytest
import torch
from support.backbones import tiny_clip, tiny_dinov2
from transformers import CLIPModel

from cap_hf.outputs import features_of
from cap_hf.recovery.tower import Tower
from cap_hf.towers import see

PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [tiny_dinov2, tiny_clip])
def test_features_are_those_that_the_model_is_seen_with(make):
    model = make()
    tower = Tower(model)
    with torch.no_grad():
        expected = features_of(see(model, {"pixel_values": PIXELS}), 1)
        for through in (None, model):
            features, states = tower.features({"pixel_values": PIXELS}, through=through)
            assert states == ()
            assert list(features) == ["class", "patch", "pooled"]
            assert all(torch.equal(features[name], expected[name]) for name in expected)
        _, states = tower.features({"pixel_values": PIXELS}, hidden_states=True)
    assert [tuple(state.shape) for state in states] == [(2, 5, 16)] * (len(states))
    assert len(states) >= 2


def test_calling_a_model_calls_its_tower_and_then_the_model_again():
    model = tiny_clip()
    tower = Tower(model)
    with torch.no_grad(), tower.called(), tower.called():
        inside = model(pixel_values=PIXELS).last_hidden_state
        assert next(iter(inspect.signature(model.forward).parameters)) == "pixel_values"
        assert torch.equal(inside, model.vision_model(pixel_values=PIXELS).last_hidden_state)
    assert "forward" not in vars(model)
    assert model.forward.__func__ is CLIPModel.forward


def test_what_wrapped_the_model_before_wraps_it_again():
    model = tiny_clip()
    model.forward = before = lambda **inputs: inputs
    with Tower(model).called():
        assert model.forward is not before
    assert model.forward is before


def test_nothing_but_the_tower_can_learn_while_it_is_trained():
    model = tiny_clip()
    model.text_projection.requires_grad_(False)
    model.vision_model.embeddings.requires_grad_(False)
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    with pytest.raises(KeyError), Tower(model).trained():
        learning = {name for name, each in model.named_parameters() if each.requires_grad}
        raise KeyError
    assert learning == {name for name in before if name.startswith("vision_model.") and ".embeddings." not in name}
    assert {name: each.requires_grad for name, each in model.named_parameters()} == before
