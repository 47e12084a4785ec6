"""Which weights are targets, and how they are cut into blocks."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import ARCHITECTURES, build
from torch import nn
from torch.nn.utils import prune

from cap_hf.errors import CAPError
from cap_hf.patterns import NMPattern
from cap_hf.targets import Target, find_targets, fit_block_size, left_alone, weight_layers

EXPECTED = {"ViT": 12, "DeiT": 12, "Dinov2": 14, "Swin": 19, "ConvNext": 15, "ResNet": 6}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_are_the_encoders_linear_and_conv_weights(name):
    model = build(name)
    targets = find_targets(model)
    names = [target.name for target in targets]
    assert len(names) == EXPECTED[name]
    assert not any(part in each for each in names for part in ("embed", "classifier", "norm", "pooler"))
    modules = dict(model.named_modules())
    assert all(modules[target.name].weight is target.weight for target in targets)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_are_weight_layers_and_the_classifier_is_one_more(name):
    model = build(name)
    layers = weight_layers(model)
    assert all(layers[target.name] is target.module for target in find_targets(model))
    outside = set(layers) - {target.name for target in find_targets(model)}
    assert any("classifier" in each for each in outside)
    assert {id(module) for module in layers.values()} == {
        id(module) for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def test_layers_that_share_a_parameter_are_one_under_the_first_name():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), Own(4, 4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    layers = weight_layers(model)
    assert list(layers) == ["0", "3", "4"]
    assert all(layers[name] is model[int(name)] for name in layers)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("block_size", ["row", 5, 24, 48])
def test_blocks_and_back(name, block_size):
    for target in find_targets(build(name), block_size):
        blocks = target.to_blocks(target.weight)
        assert blocks.shape == (target.num_blocks, target.block_size)
        assert torch.equal(target.from_blocks(blocks), target.weight)
        stacked = torch.stack([target.weight, 2 * target.weight])
        assert torch.equal(target.to_blocks(stacked)[1], 2 * blocks)


def test_a_row_of_a_convolution_runs_over_its_input_channels_first():
    conv = nn.Conv2d(4, 2, 3)
    rows = Target("conv", conv, 36).to_blocks(conv.weight)
    assert torch.equal(rows[1, :4], conv.weight[1, :, 0, 0])


@given(rows=st.integers(1, 40), row=st.integers(1, 120), size=st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_fitted_sizes_divide(rows, row, size):
    fitted = fit_block_size("layer", nn.Linear(row, rows), size)
    assert 1 <= fitted <= size
    assert row % fitted == 0 or (fitted % row == 0 and rows % (fitted // row) == 0)


@pytest.mark.parametrize(
    ("size", "fitted"), [("row", 192), (192, 192), (64, 64), (100, 96), (384, 384), (400, 384), (10**9, 768 * 192)]
)
def test_fitted_sizes(size, fitted):
    assert fit_block_size("layer", nn.Linear(192, 768), size) == fitted


def test_patterns_of_names():
    model = build("ViT")
    only = find_targets(model, include=["*.mlp.fc1", "*.attention.*"], exclude=["vit.layers.0.*"])
    assert [target.name for target in only] == [
        f"vit.layers.1.{part}"
        for part in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1")
    ]
    with pytest.raises(CAPError, match=r"--include '\*\.fc9' matches no target; the targets are vit.layers.0"):
        find_targets(model, include=["*.fc9"])
    with pytest.raises(CAPError, match="leave no target"):
        find_targets(model, exclude=["*"])


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_head_is_no_target_where_the_classifier_is_its_own_base_model(name):
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = getattr(transformers, f"{name}Config")(vision_config=small)
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    names = [target.name for target in find_targets(model)]
    assert len(names) == 6
    assert all(".encoder.layers.0." in each for each in names)


class Standardised(nn.Conv2d):
    """Computes with another weight than its own."""

    def forward(self, inputs):
        return self._conv_forward(inputs, self.weight - self.weight.mean(), self.bias)


class Padding(nn.Conv2d):
    """Computes with another input than it was given."""

    def _conv_forward(self, inputs, weight, bias):
        return super()._conv_forward(nn.functional.pad(inputs, (0, 1, 0, 1)), weight, bias)


class Named(nn.Linear):
    """Differs from a Linear in how it is made alone."""


def test_every_layer_that_is_no_target_has_its_reason():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "named": Named(4, 4),
            "standardised": Standardised(4, 4, 1),
            "padding": Padding(4, 4, 1),
            "attention": nn.MultiheadAttention(4, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "masked": prune.l1_unstructured(nn.Linear(4, 4), "weight", 2),
            "tied": nn.Linear(4, 8, bias=False),
            "words": nn.Embedding(8, 4),
            "position_mlp": nn.Linear(4, 4),
            "pixels": nn.Conv2d(3, 4, 2),
            "unwanted": nn.Linear(4, 4),
        }
    )
    model["words"].weight = model["tied"].weight
    model.config = transformers.ViTConfig(num_channels=3)
    targets = find_targets(model, exclude=["unwanted"])
    assert [target.name for target in targets] == ["plain", "named"]
    assert left_alone(model, targets) == {
        "standardised": "Standardised does not compute as its base class does",
        "padding": "Padding does not compute as its base class does",
        "attention.out_proj": "MultiheadAttention uses its weight without calling it",
        "normed": "its weight is computed from other parameters",
        "masked": "its weight is computed from other parameters",
        "tied": "it shares its weight with a module of another kind: Embedding",
        "position_mlp": "an embedding, a pooler, a decoder or a head",
        "pixels": "it reads the pixels: an embedding",
        "unwanted": "not chosen by include, exclude or pattern",
    }


def test_targets_and_what_is_left_alone_are_all_weight_layers():
    model = build("Swin")
    targets = find_targets(model, include=["*.mlp.*"])
    left = left_alone(model, targets)
    assert sorted([*left, *(target.name for target in targets)]) == sorted(weight_layers(model))
    assert left["classifier"] == "outside the encoder, swin"


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("blocks.0.mlp.fc1", True),
        ("conv_head", True),
        ("layer1.0.conv1", True),
        ("multihead.q", True),
        *(
            (name, False)
            for name in ("head", "head.fc", "head_dist", "dist_head", "decode_head.convs.0", "fc", "conv1")
        ),
        *(
            (name, False)
            for name in ("conv1.0", "stem.0", "conv_stem", "attn_pool.q", "patch_embed.proj", "classifier")
        ),
    ],
)
def test_what_is_an_encoder_in_other_libraries_names(name, targets):
    model = nn.Sequential()
    model.add_module("kept", nn.Linear(2, 2))
    place = model
    *parents, last = name.split(".")
    for parent in parents:
        place.add_module(parent, nn.Module())
        place = getattr(place, parent)
    place.add_module(last, nn.Linear(2, 2))
    assert (name in {target.name for target in find_targets(model)}) == targets


def test_what_cannot_be_pruned_at_all_is_said_with_the_reason():
    model = transformers.BitForImageClassification(
        transformers.BitConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=8, num_groups=4)
    )
    with pytest.raises(
        CAPError, match="nothing to prune .*WeightStandardizedConv2d does not compute as its base class"
    ):
        find_targets(model)


def test_adapters_are_to_be_merged_first():
    model = build("ViT")
    layer = model.vit.layers[0].mlp.fc1
    layer.base_layer = nn.Linear(2, 2)
    with pytest.raises(CAPError, match=r"ViTForImageClassification has adapters \(PEFT\): merge them"):
        find_targets(model)


def test_nothing_to_prune():
    with pytest.raises(CAPError, match="nothing to prune"):
        find_targets(nn.Sequential(nn.LayerNorm(4)))


def test_n_m_must_divide_the_input_channels():
    with pytest.raises(CAPError, match="2:4 does not divide the 6 input channels of layer.*--exclude 'layer'"):
        fit_block_size("layer", nn.Linear(6, 4), "row", NMPattern(2, 4))
    assert fit_block_size("layer", nn.Linear(24, 4), 10, NMPattern(2, 4)) == 8
    with pytest.raises(CAPError, match="fisher_block_size=3"):
        fit_block_size("layer", nn.Linear(24, 4), 3, NMPattern(2, 4))


@pytest.mark.parametrize("size", ["16", "auto"])
def test_a_block_size_in_words_is_refused_unless_it_is_row(size):
    with pytest.raises(CAPError, match=f"block_size='{size}' is neither 'row' nor a number"):
        fit_block_size("layer", nn.Linear(24, 4), size)
