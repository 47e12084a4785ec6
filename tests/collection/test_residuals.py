"""Which layers only add their last target's output to what they return, and with which factors."""

from types import SimpleNamespace

import pytest
import torch
from support.models import TINY_VIT, build
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from cap_hf import find_targets
from cap_hf.collection.refitting import refittable
from cap_hf.collection.residuals import find_residuals, scales_of
from cap_hf.collection.running import frozen
from cap_hf.distributed.processes import Processes


def residuals(model, shape, processes=None):
    """The names of the layers, and their factors, by the name of the target; without gradients outside."""
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    inputs = {"pixel_values": torch.randn(6, *shape, dtype=dtype)}
    names = {module: name for name, module in model.named_modules()}
    with frozen(model), torch.no_grad():
        chosen = refittable(model, find_targets(model), inputs)
        targets = [target for target in find_targets(model) if target.name in chosen]
        found = find_residuals(model, targets, inputs, processes or Processes())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return {name: (names[each.layer], each.scales) for name, each in found.items()}


def layers_of(model, shape):
    return {name: layer for name, (layer, _) in residuals(model, shape).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transformer_s_layers_are(dtype):
    found = residuals(build("ViT").to(dtype), (3, 8, 8))
    for index in range(2):
        layer, scales = found.pop(f"vit.layers.{index}.mlp.fc2")
        assert layer == f"vit.layers.{index}"
        torch.testing.assert_close(scales, torch.ones(16, dtype=dtype))
    assert not found


@pytest.mark.parametrize("swiglu", [False, True])
def test_layer_scale_gives_the_factors(swiglu):
    model = Dinov2Model(Dinov2Config(**{**TINY_VIT, "num_channels": 3}, use_swiglu_ffn=swiglu)).eval()
    for layer in model.encoder.layer:
        layer.layer_scale2.lambda1.data.normal_()
    # Nothing of this channel comes through.
    model.encoder.layer[1].layer_scale2.lambda1.data[3] = 0
    found = residuals(model, (3, 8, 8))
    assert list(found) == [
        f"encoder.layer.{index}.mlp.{'down_proj' if swiglu else 'fc2'}" for index in range(len(model.encoder.layer))
    ]
    for (name, scales), layer in zip(found.values(), model.encoder.layer, strict=True):
        assert model.get_submodule(name) is layer
        torch.testing.assert_close(scales, layer.layer_scale2.lambda1.data)


def test_swin_s_are_within_stages_that_return_the_same_twice():
    """The last stage hands on what its last layer returns, and gives it once more beside that."""
    found = layers_of(build("Swin"), (3, 16, 16))
    assert found == {name: name.removesuffix(".mlp.fc2") for name in found}
    assert [name.removeprefix("swin.encoder.layers.") for name in found] == [
        f"{place}.mlp.fc2" for place in ("0.blocks.0", "0.blocks.1", "1.blocks.0")
    ]


@pytest.mark.parametrize(("name", "side"), [("ConvNext", 32), ("ResNet", 16), ("ResNet", 8)])
def test_layers_that_permute_or_rectify_what_they_return_are_not(name, side):
    """Nor are convolutions with batch norm, which add the same everywhere; at 8 pixels a ResNet ends in one."""
    assert layers_of(build(name), (3, side, side)) == {}


class Block(nn.Module):
    """A hidden layer and one that comes back, put together as a test wants it."""

    def __init__(self, end):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
        self.norm, self.end = nn.LayerNorm(6), end

    def forward(self, x):
        return self.end(self, x, self.inner(x))


class Pair(tuple):
    """A tuple with something of its own, as named ones have it."""


class Model(nn.Module):
    """A block on tokens."""

    def __init__(self, end):
        super().__init__()
        self.block = Block(end)

    def forward(self, pixel_values):
        return SimpleNamespace(tokens=self.block(pixel_values.flatten(2).mT))


ENDS = {
    "in a tuple": (lambda block, x, y: (x + y, x.mean()), True),
    "scaled, and the input too": (lambda block, x, y: 3 * x - y / 2, True),
    "alone": (lambda block, x, y: y, False),
    "scaled alone": (lambda block, x, y: 2 * y + 1, False),
    "normed after the sum": (lambda block, x, y: block.norm(x + y), False),
    "rectified after the sum": (lambda block, x, y: (x + y).relu(), False),
    "multiplied": (lambda block, x, y: x * y, False),
    "in a tuple with more of it": (lambda block, x, y: (x + y, y.mean()), False),
    "in a tuple of another kind": (lambda block, x, y: Pair((x + y, x)), False),
    "in a dict": (lambda block, x, y: {"tokens": x + y}, False),
    "pooled": (lambda block, x, y: (x + y).mean(1), False),
    "cut off": (lambda block, x, y: x + y.detach(), False),
    "not finite": (lambda block, x, y: x / 0 + y, False),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("side", [1, 3])
def test_what_a_layer_returns_decides(end, side):
    """At a single position too, where what tells it from others is how examples differ."""
    returned, expected = ENDS[end]
    assert layers_of(Model(returned), (6, side, side)) == ({"block.inner.2": "block"} if expected else {})


def test_of_one_position_nothing_is_known():
    for count, expected in ((1, None), (2, [1.0] * 6)):
        outputs = torch.randn(count, 6, requires_grad=True)
        scales = scales_of(torch.randn(count, 6) + outputs, outputs, -1)
        assert (None if scales is None else scales.tolist()) == expected


def test_only_what_all_processes_find_counts():
    """A process whose examples leave a layer out has none of it."""

    class Two(Processes):
        def gather_ints(self, *values):
            return [list(values), [-1, *values[1:]]]

    class Third(Processes):
        def gather_ints(self, *values):
            return [list(values), [value if value < 0 else -1 for value in values]]

    model = build("ViT")
    assert list(residuals(model, (3, 8, 8), Two())) == ["vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2"]
    assert residuals(model, (3, 8, 8), Third()) == {}
