"""The rows that a weight is multiplied with."""

import pytest
import torch
from torch import nn

from cap_hf.method import gradients
from cap_hf.method.inputs import input_rows
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
