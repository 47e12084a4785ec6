"""Which layers can be gone through alone."""

import pytest
import torch
from support.backbones import tiny_dinov2
from support.models import ARCHITECTURES, build, random_batches
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.chains import agreed, candidates, find_chains
from cap_hf.collection.forecast import Alike
from cap_hf.collection.running import frozen
from cap_hf.collection.stretches import Chain
from cap_hf.method.losses import LabelLoss
from cap_hf.targets import find_targets


def chains_of(model: nn.Module, side: int, **options) -> list[Chain]:
    (batch,) = random_batches(model, side, sizes=(2,))
    targets = find_targets(model, **options)
    with frozen(model):
        return find_chains(model, batch, LabelLoss(), None, targets, 2)


# How many layers stand one after the other; of Swin and ConvNeXt something lies between the stages.
EXPECTED = {"ViT": [2], "DeiT": [2], "Dinov2": [2], "Swin": [2, 1], "ConvNext": [1, 1, 1, 1], "ResNet": [2]}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_chains(name):
    found = chains_of(build(name), ARCHITECTURES[name][1])
    assert [len(chain.layers) for chain in found] == EXPECTED[name]
    for chain in found:
        assert len(chain.sizes) == len(chain.layers) + 1
        assert all(size > 0 for size in chain.sizes)


def test_sizes_are_those_of_one_gradient_sample():
    # Four patches and a class token, of 16 channels in float32.
    (chain,) = chains_of(build("ViT"), 8)
    assert chain.sizes == (5 * 16 * 4,) * 3
    assert chain.beside == 0


def test_layers_without_targets_are_links_too():
    (chain,) = chains_of(build("ViT", num_hidden_layers=3), 8, include=["*.layers.1.*"])
    assert [len(names) for names in chain.targets] == [0, 6, 0]


def test_what_is_used_elsewhere_too_makes_no_chain():
    """The gradients of a head of several scales do not all come through the layers behind."""
    model = build("ViT", num_hidden_layers=3)
    seen = []
    model.vit.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))

    def add(module, args, output):
        return output + 0.1 * seen.pop()

    model.vit.layernorm.register_forward_hook(add)
    assert chains_of(model, 8) == []


def test_a_layer_that_goes_by_what_the_model_has_set_makes_no_chain():
    model = build("ViT")
    times = iter(range(1, 100))
    model.vit.layers[1].register_forward_hook(lambda module, args, output: output * next(times))
    assert chains_of(model, 8) == []


def test_a_layer_that_is_called_twice_breaks_the_chain():
    model = build("ViT", num_hidden_layers=3)
    layer = model.vit.layers[2]
    forward = layer.forward
    model.vit.layers[2].forward = lambda hidden, *args, **kwargs: forward(forward(hidden, *args, **kwargs))
    found = chains_of(model, 8)
    # Called twice inside of itself it is one layer still; called twice by the model it is none.
    assert [len(chain.layers) for chain in found] == [3]
    model.vit.layers = nn.ModuleList([model.vit.layers[0], model.vit.layers[1], model.vit.layers[1]])
    found = chains_of(model, 8)
    assert [len(chain.layers) for chain in found] == [1]


def test_large_tensors_beside_the_hidden_states_make_no_chain():
    model = build("ViT")

    def heavy(module, args, kwargs):
        return args, {**kwargs, "extra": torch.zeros(10**4)}

    forward = model.vit.layers[1].forward
    model.vit.layers[1].forward = lambda *args, extra=None, **kwargs: forward(*args, **kwargs)
    handle = model.vit.layers[1].register_forward_pre_hook(heavy, with_kwargs=True)
    assert [len(chain.layers) for chain in chains_of(model, 8)] == [1]
    handle.remove()
    assert [len(chain.layers) for chain in chains_of(model, 8)] == [2]


def test_candidates_are_the_innermost_lists_of_whole_layers():
    model = build("ResNet")
    found = candidates(model, find_targets(model))
    # Not the convolutions in them, of which each is one target, and not the stages.
    assert {type(each).__name__ for each in found} == {"ResNetBasicLayer"}
    backbone = tiny_dinov2()
    assert len(candidates(backbone, find_targets(backbone))) == backbone.config.num_hidden_layers


def test_processes_that_have_found_other_chains_have_none():
    chain = Chain((nn.Linear(2, 2),), (frozenset({"a"}),), (8, 8))
    assert agreed([chain], Alike(3, torch.device("cpu"))) == [chain]

    class Differing(Alike):
        def gather_ints(self, *values: int) -> list[list[int]]:
            return [list(values), [values[0] + 1]]

    assert agreed([chain], Differing(2, torch.device("cpu"))) == []


class Writing(nn.Module):
    """A layer that writes into what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.first, self.second = nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.relu(x)))


class Net(nn.Module):
    """Three of them behind a stem, as a classifier of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.classifier = (
            nn.Linear(48, 4),
            nn.ModuleList(Writing() for _ in range(3)),
            nn.Linear(4, 10),
        )

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        x = self.stem(pixel_values.flatten(1))
        for layer in self.layers:
            x = layer(x)
        return ImageClassifierOutput(logits=self.classifier(x))


def test_layers_that_write_into_their_inputs_are_pruned_without_chains():
    torch.manual_seed(0)
    model = Net()
    batches = [{"pixel_values": torch.randn(8, 3, 4, 4), "labels": torch.randint(0, 10, (8,))} for _ in range(4)]
    compressor = CAPCompressor(model, CAPConfig(num_grads=32, include=["layers.*"])).collect(batches)
    assert compressor.prune(0.5).sparsity == 0.5
    with frozen(model):
        assert find_chains(model, batches[0], LabelLoss(), None, compressor.targets, 8) == []


def test_what_fails_alone_makes_no_chain():
    model = build("ViT", num_hidden_layers=3)
    layer, state = model.vit.layers[1], {}
    forward = layer.forward
    model.vit.layers[0].register_forward_hook(lambda *_: state.update(there=True))
    layer.forward = lambda *args, **kwargs: (state.pop("there"), forward(*args, **kwargs))[1]
    model.vit.layers[0].register_forward_pre_hook(lambda *_: state.clear())
    assert [len(chain.layers) for chain in chains_of(model, 8)] == [3]
    # As of one that only the model itself gives what it needs.
    model.vit.layers[0]._forward_hooks.clear()
    model.vit.embeddings.register_forward_hook(lambda *_: state.update(there=True))
    model.vit.layers[0]._forward_pre_hooks.clear()
    assert chains_of(model, 8) == []
