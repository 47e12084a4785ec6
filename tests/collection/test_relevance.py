"""The weights of positions against gradients of single examples, one by one, by plain autograd."""

import copy

import pytest
import torch
from support.models import TINY_VIT, build, random_batches
from support.refits import sampled_loss, weights_by_hand
from torch import nn
from transformers import Dinov2Config, Dinov2Model, set_seed
from transformers.modeling_outputs import ImageClassifierOutput

import cap_hf.collection.relevance as relevance
from cap_hf import CAPConfig, find_targets
from cap_hf.collection.relevance import Relevance, label_free_loss, position_weights, weights_of
from cap_hf.collection.running import frozen
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.losses import FeatureLoss, SampledLabelLoss

# Where seven examples stand among those of all processes: some are elsewhere.
PLACES = [0, 1, 2, 6, 7, 8, 11]


def weights(model, inputs, config=None, places=PLACES):
    """What is found, without gradients outside as in a refit."""
    with frozen(model), torch.no_grad():
        return position_weights(
            model, find_targets(model), inputs, torch.tensor(places), config or CAPConfig(), Processes()
        )


def pixels_of(model, side, count=7):
    return {"pixel_values": random_batches(model, side, (count,))[0]["pixel_values"]}


class Dimmed(nn.Module):
    """A convolution on pixels, one more in groups, and a second input that says how bright an image is."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3, stride=2, groups=2)
        self.last = nn.Linear(4, 3)

    def forward(self, pixel_values, brightness):
        maps = self.second(self.first(pixel_values).relu() * brightness[:, None, None, None])
        return ImageClassifierOutput(logits=self.last(maps.sigmoid().mean((2, 3))))


def case(name):
    """A model in float64 and its inputs."""
    if name == "Dimmed":
        set_seed(0)
        return Dimmed().double(), {
            "pixel_values": torch.randn(7, 4, 9, 9).double(),
            "brightness": torch.rand(7).double(),
        }
    model = build(name).double()
    return model, pixels_of(model, {"ViT": 8, "Swin": 16, "ResNet": 16, "ConvNext": 32}[name])


@pytest.mark.parametrize("name", ["ViT", "Swin", "ResNet", "ConvNext", "Dimmed"])
def test_they_are_the_squared_gradients_of_single_examples(name, monkeypatch):
    """In several microbatches, of windows and maps too, with labels drawn by each example's place."""
    monkeypatch.setattr(relevance, "MICROBATCH", 3)
    model, inputs = case(name)
    found = weights(model, inputs, CAPConfig(seed=3))
    assert list(found) == [target.name for target in find_targets(model)]
    for layer, each in found.items():
        expected = weights_by_hand(model, layer, inputs, sampled_loss(PLACES, 3))
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-7, msg=lambda text, layer=layer: layer + text)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_backbone_s_are_of_the_error_of_its_features():
    set_seed(0)
    model = Dinov2Model(Dinov2Config(**{**TINY_VIT, "num_channels": 3})).double().eval()
    inputs = pixels_of(model, 8)
    with torch.no_grad():
        outputs = model(**inputs)
    tokens = outputs.last_hidden_state
    spread = {"class": tokens[:, :1], "patch": tokens[:, 1:], "pooled": outputs.pooler_output[:, None]}
    spread = {name: part.flatten(0, 1).std(0, correction=0) for name, part in spread.items()}
    seeds = torch.randint(2**62, (12,), generator=torch.Generator().manual_seed(42))

    def loss(outputs, index):
        tokens = outputs.last_hidden_state[0]
        parts = {"class": tokens[:1], "patch": tokens[1:], "pooled": outputs.pooler_output}
        size = sum(part.numel() for part in parts.values())
        generator = torch.Generator().manual_seed(int(seeds[PLACES[index]]))
        signs = torch.randint(2, (size,), generator=generator, dtype=torch.int8).double() * 2 - 1
        total = 0
        for (name, part), sign in zip(
            parts.items(), signs.split([part.numel() for part in parts.values()]), strict=True
        ):
            weight = {"class": 1.0, "patch": 0.5, "pooled": 2.0}[name]
            total += (weight / part.numel()) ** 0.5 * (sign.view_as(part) * part / spread[name]).sum()
        return total

    config = CAPConfig(class_weight=1.0, patch_weight=0.5, pooled_weight=2.0)
    for layer, each in weights(model, inputs, config).items():
        torch.testing.assert_close(each, weights_by_hand(model, layer, inputs, loss), rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_fisher_s_where_that_needs_no_labels():
    classifier, backbone = build("ViT"), build("ViT").vit
    inputs, processes = pixels_of(classifier, 8), Processes()
    for wish, kind in ((None, SampledLabelLoss), ("labels", SampledLabelLoss), ("features", FeatureLoss)):
        loss = label_free_loss(classifier, inputs, CAPConfig(fisher_loss=wish, patch_weight=0), processes)
        assert isinstance(loss, kind)
    # As a config has it that no gradients were collected with.
    assert isinstance(label_free_loss(backbone, inputs, CAPConfig(), processes), FeatureLoss)


def test_positions_that_the_loss_does_not_see_count_little_and_one_that_it_sees_alone_not_all():
    """The head reads the class token of the last layer alone: 37 times the mean is more than there may be."""
    model = build("ViT", image_size=24)
    found = weights(model, pixels_of(model, 24))
    expected = torch.full((7, 37), 0.1, dtype=torch.float64)
    expected[:, 0] = 0.1 + 0.9 * 20
    torch.testing.assert_close(found["vit.layers.1.mlp.fc2"], expected)
    assert found["vit.layers.0.mlp.fc2"][:, 1:].min() > 0.1
    for each in found.values():
        assert each.mean(1).max() < 1 + 1e-9


def test_without_a_gradient_all_positions_are_alike_and_a_broken_one_is_no_number():
    model = build("ViT")
    model.classifier.weight.data.zero_()
    for each in weights(model, pixels_of(model, 8)).values():
        assert torch.equal(each, torch.ones(7, each.shape[1], dtype=torch.float64))
    squares = torch.tensor([[1.0, 3.0], [0.0, 0.0], [torch.inf, 1.0], [torch.nan, 0.0], [1e-90, 0.0]]).double()
    squares[4, 0] = 1e-90
    found = weights_of(squares)
    torch.testing.assert_close(found[[0, 1, 4]], torch.tensor([[0.55, 1.45], [1.0, 1.0], [1.9, 0.1]]).double())
    assert found[2:4].isnan().any(1).all()


def test_an_example_has_the_same_in_whatever_process_it_is():
    model, inputs = case("ViT")
    whole, part = weights(model, inputs), {"pixel_values": inputs["pixel_values"][4:]}
    alone, elsewhere = weights(model, part, places=PLACES[4:]), weights(model, part, places=[0, 1, 2])
    for name, each in whole.items():
        torch.testing.assert_close(alone[name], each[4:])
    assert any(not torch.allclose(elsewhere[name], each[4:]) for name, each in whole.items())


def test_a_layer_that_is_not_called_by_example_is_told():
    """And the hooks are gone."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, pixel_values):
            table = self.layer(torch.eye(4))
            return ImageClassifierOutput(logits=self.last(pixel_values.mean((2, 3)) @ table))

    model = Fixed()
    with pytest.raises(CAPError, match=r"layer mixes examples \(its input has 4 rows for 3 examples\)"):
        weights(model, {"pixel_values": torch.randn(7, 4, 5, 5)})
    assert not any(module._forward_hooks for module in model.modules())


def test_features_that_are_not_finite_are_told():
    model = copy.deepcopy(build("ViT").vit)
    inputs = {"pixel_values": torch.full((7, 3, 8, 8), torch.inf)}
    with pytest.raises(CAPError, match=r"the model's .* features are NaN or infinite"):
        weights(model, inputs)


class OtherHasChanged(Processes):
    """This process beside one whose examples have changed."""

    def gather_ints(self, *values):
        return [list(values), [0] * len(values)]


def test_they_are_made_once_for_the_same_and_anew_where_anything_has_changed(monkeypatch):
    """The targets' own weights and biases apart: a refit asks for those of the dense model, whatever they are now."""
    made, make = [], position_weights
    monkeypatch.setattr(relevance, "position_weights", lambda *args: made.append(1) or make(*args))
    model, inputs = case("ViT")
    known, targets = Relevance(), find_targets(model)

    def ask(**changes):
        asked = {"targets": targets, "inputs": inputs, "places": torch.tensor(PLACES), "config": CAPConfig()} | changes
        asked = {"model": model, "processes": Processes()} | asked
        with frozen(model), torch.no_grad():
            return known.position_weights(**asked)

    first = ask()
    with frozen(model), torch.no_grad():
        expected = make(model, targets, inputs, torch.tensor(PLACES), CAPConfig(), Processes())
    assert all(torch.equal(each, expected[name]) for name, each in first.items())
    for target in targets:
        target.weight.data.mul_(0.5)
        target.module.bias.data.add_(1)
    assert ask() is first
    assert ask(config=CAPConfig(allocation="uniform", selection="cumulative")) is first
    assert len(made) == 1
    pixels = inputs["pixel_values"].clone()
    pixels[6, 0, 0, 0] += 1
    changes = {"inputs": {"pixel_values": pixels}, "places": torch.arange(7), "config": CAPConfig(seed=3)}
    for name, value in {**changes, "targets": targets[1:]}.items():
        before, found = len(made), ask(**{name: value})
        assert ask(**{name: value}) is found
        assert len(made) == before + 1, name
    for tensor in (model.classifier.bias, model.vit.layernorm.weight):
        ask()
        before = len(made)
        tensor.data.add_(1)
        ask()
        assert len(made) == before + 1
    before = len(made)
    ask(processes=OtherHasChanged())
    assert len(made) == before + 1
