"""Masks are what is 0 in a model; they can be put back and checked."""

import pytest
import torch
from support.models import build

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.masks import apply_masks, count_zeros, find_pattern, take_masks, target_sparsity, verify_masks
from cap_hf.targets import find_targets


def test_take_apply_verify():
    model = build("ViT")
    CAPCompressor(model, CAPConfig(method="magnitude")).prune(0.5)
    targets = find_targets(model)
    masks = take_masks(targets)
    pruned = {target.name: target.weight.detach().clone() for target in targets}
    verify_masks(targets, masks)
    weight = targets[3].weight
    row, column = (int(i) for i in (~masks[targets[3].name]).nonzero()[0])
    for value in (1e-30, float("nan"), float("inf")):
        weight.data[row, column] = value
        with pytest.raises(CAPError, match=targets[3].name):
            verify_masks(targets, masks)
        apply_masks(targets, masks)
        verify_masks(targets, masks)
        assert all(torch.equal(target.weight, pruned[target.name]) for target in targets)


@pytest.mark.parametrize("allocation", ["2:4", "1:4", "1:2", "4:8"])
def test_find_pattern(allocation):
    model = build("ViT")
    targets = find_targets(model)
    assert find_pattern(targets[0], targets[0].weight != 0) is None
    CAPCompressor(model, CAPConfig(method="magnitude", allocation=allocation)).prune()
    assert str(find_pattern(targets[0], targets[0].weight != 0)) == allocation


def test_zeros_are_counted_in_the_targets_that_are_given():
    targets = find_targets(build("ViT"))[:2]
    targets[0].weight.data[0] = 0
    zeros, total = targets[0].weight[0].numel(), sum(target.weight.numel() for target in targets)
    assert count_zeros(targets) == (zeros, total)
    assert target_sparsity(targets) == zeros / total
