"""Masks are what is 0 in a model; they can be put back and checked."""

import pytest
import torch
from support.models import build
from torch import nn

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.masks import (
    apply_masks,
    count_zero_blocks,
    count_zeros,
    describe_masks,
    differing_layers,
    find_pattern,
    take_masks,
    target_sparsity,
    verify_masks,
)
from cap_hf.patterns import BlockPattern
from cap_hf.targets import Target, find_targets


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


@pytest.mark.parametrize(
    ("kept", "pattern"),
    [
        # Of each row its blocks of two inputs that are kept.
        ("1101 1011", "1x2"),
        ("1100 1111", "1x4"),
        ("1111 0000", "1x8"),
        ("1010 1010", "2:4"),
        ("1111 1111", None),
    ],
)
def test_whole_blocks_are_a_pattern(kept, pattern):
    target = Target("layer", nn.Linear(8, 2, bias=False), 8)
    rows = torch.tensor([[digit == "1" for digit in row] for row in kept.split()]).repeat_interleave(2, dim=1)
    assert str(find_pattern(target, rows)) == str(pattern)
    blocks = count_zero_blocks(target, rows)
    assert blocks["1x2"] == kept.count("0")
    assert blocks["1x4"] == sum(row[at : at + 2] == "00" for row in kept.split() for at in (0, 2))


def test_sizes_that_do_not_divide_the_inputs_have_no_blocks():
    target = Target("layer", nn.Linear(6, 2, bias=False), 6)
    assert list(count_zero_blocks(target, torch.ones(2, 6, dtype=torch.bool))) == ["1x2"]


def test_a_rounded_model_may_have_more_zeros_than_its_report_and_no_others():
    model = build("ViT")
    CAPCompressor(model, CAPConfig(method="magnitude")).prune(0.5)
    targets = find_targets(model)
    report = {"layers": describe_masks(targets)}
    assert differing_layers(targets, report) == differing_layers(targets, report, rounded=True) == []
    weight = targets[3].weight.data.view(-1)
    zero, other = int((weight == 0).nonzero()[0]), int((weight != 0).nonzero()[0])
    weight[other] = 0
    assert differing_layers(targets, report) == [targets[3].name]
    assert differing_layers(targets, report, rounded=True) == []
    weight[zero] = 1
    assert differing_layers(targets, report, rounded=True) == [targets[3].name]
    weight[(weight == 0).nonzero()[:3]] = 1
    assert differing_layers(targets, report, rounded=True) == [targets[3].name]


@pytest.mark.parametrize(("pattern", "unit"), [("1x2", 2), ("1x4", 4), ("1x8", 8)])
@pytest.mark.parametrize("sparsity", [0.25, 0.75, 0.95])
def test_a_few_zeros_of_rounding_hide_no_blocks(pattern, unit, sparsity):
    generator = torch.Generator().manual_seed(0)
    target = Target("x", nn.Linear(256, 128), 256, 0)
    mask = (torch.rand(128, 256 // unit, generator=generator) >= sparsity).repeat_interleave(unit, dim=1)
    rounded = mask & (torch.rand(128, 256, generator=generator) >= 0.02)
    assert str(find_pattern(target, mask)) == str(find_pattern(target, mask, rounded=True)) == pattern
    assert find_pattern(target, rounded) is None
    assert str(find_pattern(target, rounded, rounded=True)) == pattern


@pytest.mark.parametrize("sparsity", [0.01, 0.05, 0.25, 0.75, 0.95, 0.99])
def test_zeros_one_by_one_are_no_blocks_of_a_rounded_weight(sparsity):
    target = Target("x", nn.Linear(256, 128), 256, 0)
    mask = torch.rand(128, 256, generator=torch.Generator().manual_seed(0)) >= sparsity
    assert not isinstance(find_pattern(target, mask, rounded=True), BlockPattern)
