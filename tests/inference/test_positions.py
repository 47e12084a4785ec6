"""Multiply-adds against PyTorch's own counter of operations, and against what an architecture says."""

import pytest
import torch
from support.models import ARCHITECTURES, build, random_batches
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cap_hf.errors import CAPError
from cap_hf.inference.positions import count_positions
from cap_hf.targets import find_targets


def example(name, model):
    return random_batches(model, ARCHITECTURES[name][1], sizes=(3,))[0]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_they_are_those_that_torch_counts_of_the_layers(name):
    model = build(name)
    targets, inputs = find_targets(model), example(name, model)
    model.train()
    positions = count_positions(model, targets, inputs)
    assert model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(pixel_values=inputs["pixel_values"][:1])
    counted = counter.get_flop_counts()
    root = type(model).__name__
    for target in targets:
        # It counts a multiplication and an addition as two operations.
        assert 2 * positions[target.name] * target.weight.numel() == sum(counted[f"{root}.{target.name}"].values())


def test_stages_see_fewer_and_fewer_positions():
    model = build("Swin")
    positions = count_positions(model, find_targets(model), example("Swin", model))
    assert positions["swin.encoder.layers.0.blocks.0.attention.q_proj"] == 64
    assert positions["swin.encoder.layers.1.blocks.0.attention.q_proj"] == 16


def test_a_weight_that_two_layers_use_is_multiplied_twice_as_often():
    model = build("ViT")
    first, second = model.vit.layers
    before = count_positions(model, find_targets(model), example("ViT", model))
    second.mlp.fc1.weight = first.mlp.fc1.weight
    after = count_positions(model, find_targets(model), example("ViT", model))
    name = "vit.layers.0.mlp.fc1"
    assert after[name] == 2 * before[name]


def test_a_model_that_uses_no_target_is_one_line(monkeypatch):
    model = build("ViT")
    targets = find_targets(model)
    other = nn.Linear(16, 16)
    lonely = [type(targets[0])(name="lonely", module=other, block_size=16)]
    with pytest.raises(CAPError, match="no target of ViTForImageClassification takes part in what it makes"):
        count_positions(model, lonely, example("ViT", model))
    assert count_positions(model, [*targets, *lonely], example("ViT", model))["lonely"] == 0
