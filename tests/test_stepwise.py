"""Pruning in steps, each with a Fisher of its own."""

import pytest
import torch
from support.checkpoints import assert_same_weights
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.errors import CAPError
from cap_hf.masks import count_zeros
from cap_hf.stepwise import prune_in_steps, steps_towards

CONFIG = CAPConfig(num_grads=8, fisher_block_size=16, refit_examples=8)


def test_steps_keep_the_same_share_each_time():
    assert steps_towards(0.5, 0) == [0.5]
    assert steps_towards(0.99, 1) == [pytest.approx(0.9), 0.99]
    assert steps_towards(0.992, 2) == pytest.approx([0.8, 0.96, 0.992])
    # From a model of which half is left: a quarter of it, then a quarter of that.
    assert steps_towards(1 - 1 / 32, 1, start=0.5) == pytest.approx([1 - 1 / 8, 1 - 1 / 32])
    assert steps_towards(0.5, 3, start=0.5) == [0.5] * 4
    assert steps_towards(0.0, 1) == [0.0, 0.0]
    with pytest.raises(CAPError, match="num_recomputations=-1 must be at least 0"):
        steps_towards(0.5, -1)


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_steps_are_those_of_prunes_in_a_row(name):
    """Each sparsity begins with the dense model, whatever was made of it before, and is the work of plain prunes."""
    recalibrates = name == "ResNet"
    model = build(name)
    batches = random_batches(model, 8)
    compressor = CAPCompressor(model, CONFIG, disable_tqdm=True)
    reports = prune_in_steps(compressor, batches, [0.75, 0.91], 1, refits=True, recalibrates=recalibrates)
    found = []
    for sparsity, report in zip([0.75, 0.91], reports, strict=True):
        assert report.sparsity == pytest.approx(sparsity, abs=1e-3)
        found.append({key: value.clone() for key, value in model.state_dict().items()})
        # As healing moves it between two sparsities.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    for weights, (first, last) in zip(found, [(0.5, 0.75), (0.7, 0.91)], strict=True):
        expected = build(name)
        before = CAPCompressor(expected, CONFIG, disable_tqdm=True).collect(batches)
        before.prune(first)
        before.refit(batches)
        if recalibrates:
            before.recalibrate_batch_norm(batches)
        CAPCompressor(expected, CONFIG, disable_tqdm=True).collect(batches).prune(last)
        for key, value in expected.state_dict().items():
            assert torch.equal(weights[key], value), key


def test_without_recomputations_it_is_a_plain_prune():
    batches = random_batches(build("ViT"), 8)
    model, expected = build("ViT"), build("ViT")
    (report,) = prune_in_steps(CAPCompressor(model, CONFIG, disable_tqdm=True), batches, [0.6], 0)
    other = CAPCompressor(expected, CONFIG, disable_tqdm=True).collect(batches).prune(0.6)
    assert report.loss == other.loss
    assert_same_weights(model, expected)


def test_a_sparsity_below_that_of_the_model_is_refused_and_a_step_is_never_below_it():
    model = build("ViT")
    batches = random_batches(model, 8)
    CAPCompressor(model, CONFIG, disable_tqdm=True).collect(batches).prune(0.5)
    compressor = CAPCompressor(model, CONFIG, disable_tqdm=True)
    (report,) = prune_in_steps(compressor, batches, [0.6], 2)
    zeros, total = count_zeros(compressor.targets)
    assert report.sparsity == pytest.approx(zeros / total)
    with pytest.raises(CAPError, match="sparse already: sparsity 0.4 would be less"):
        next(prune_in_steps(compressor, batches, [0.4], 2))
