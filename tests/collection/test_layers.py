"""The layer of a target, read, written and put back."""

import pytest
import torch
from support.models import build
from torch import nn

from cap_hf import find_targets
from cap_hf.collection.layers import as_dense, channel_dim, check_unmixed, layer_of, rows_of, write_layer
from cap_hf.errors import CAPError
from cap_hf.targets import Target


def test_a_row_is_what_feeds_one_output():
    layer = nn.Conv2d(2, 3, 2)
    rows = rows_of(Target("layer", layer, 4), layer.weight)
    assert rows.shape == (3, 8)
    # Input channels last.
    torch.testing.assert_close(rows[1], layer.weight[1].permute(1, 2, 0).flatten())


def test_layers_are_dense_for_a_while_also_where_something_fails():
    dense, model = build("ViT"), build("ViT")
    targets = find_targets(model)
    dense.vit.layers[0].mlp.fc1.bias.data.add_(1)
    for target in targets:
        weight, bias = layer_of(target)
        write_layer(target, weight * 2, bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def layer(target):
        module = dense.get_submodule(target.name)
        return module.weight, module.bias

    with pytest.raises(KeyboardInterrupt), as_dense(targets, layer):
        assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_a_bias_there_is_none():
    target = Target("layer", nn.Linear(3, 2, bias=False), 3)
    weight, bias = layer_of(target)
    assert bias is None
    write_layer(target, weight + 1, None)
    assert torch.equal(target.weight, weight + 1)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 5), (2, 7, 3)), (nn.Linear(3, 5), (2, 3)), (nn.Conv2d(3, 5, 1), (2, 3, 4, 4))]
)
def test_where_channels_are(layer, shape):
    assert layer(torch.zeros(shape)).shape[channel_dim(layer)] == 5


def test_rows_of_mixed_examples_are_told():
    target = Target("layer", nn.Linear(3, 2), 3)
    check_unmixed(target, 12, 4)
    with pytest.raises(CAPError, match=r"layer mixes examples \(its input has 9 rows for 4 examples\).*--exclude"):
        check_unmixed(target, 9, 4)
