"""The rows that a weight is multiplied with."""

import pytest
import torch
from torch import nn

from cap_hf.method import gradients
from cap_hf.method.inputs import input_rows, moment_size, moments_of, num_moments
from cap_hf.targets import Target


@pytest.mark.parametrize("patch_bytes", [1, 2**24])
@pytest.mark.parametrize(
    "module",
    [nn.Linear(6, 5, bias=False), nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.Conv2d(6, 4, 3, groups=2, bias=False)],
    ids=["linear", "conv", "groups"],
)
def test_rows_times_the_weight_are_the_output(monkeypatch, module, patch_bytes):
    """In a target's order, whatever share of the examples is unfolded at a time."""
    monkeypatch.setattr(gradients, "PATCH_BYTES", patch_bytes)
    target = Target("layer", module, module.weight[0].numel())
    inputs = torch.randn(3, 7, 6) if isinstance(module, nn.Linear) else torch.randn(3, 6, 5, 5)
    outputs = module(inputs).detach()
    parts = list(input_rows(target, module, inputs, outputs))
    assert len(parts) == (3 if target.is_conv and patch_bytes == 1 else 1)
    rows = torch.cat(parts, dim=1)
    groups = getattr(module, "groups", 1)
    weights = target.to_blocks(module.weight.detach()).unflatten(0, (groups, -1))
    found = torch.cat([row @ weight.T for row, weight in zip(rows, weights, strict=True)], dim=1)
    expected = outputs.movedim(1, -1) if target.is_conv else outputs
    torch.testing.assert_close(found, expected.reshape(found.shape))


@pytest.mark.parametrize("size", [3, 18, 54])
def test_blocks_find_their_moments(size):
    """A row of 18 in 6 parts, alone, and three at a time; rows 0 and 1 are of the first group, 2 and 3 of the second.

    Of three rows together the second block of a target of six has two of one group.
    """
    module = nn.Conv2d(4, 12 if size == 54 else 4, 3, groups=2)
    target = Target("layer", module, size)
    count, side = num_moments(target), moment_size(target)
    index = moments_of(target, torch.arange(target.num_blocks))
    assert (count, side) == {3: (12, 3), 18: (2, 18), 54: (2, 18)}[size]
    weights = torch.arange(target.weight.numel())
    row, place = weights // 18, weights % 18
    expected = row // (len(target.weight) // 2) * (18 // side) + place // side
    assert torch.equal(index.flatten().repeat_interleave(side), expected)
