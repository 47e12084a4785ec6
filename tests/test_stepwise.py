"""Pruning in steps, each with a Fisher of its own."""

from dataclasses import replace

import pytest
import torch
from support.checkpoints import assert_same_weights
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig, Resources
from cap_hf.collection import planning
from cap_hf.errors import CAPError
from cap_hf.masks import count_zeros
from cap_hf.stepwise import prune_in_steps, steps_towards

CONFIG = CAPConfig(num_grads=8, fisher_block_size=16, refit_examples=8)


def test_every_step_halves_what_is_left():
    assert steps_towards(0.5, 0) == [0.5]
    assert steps_towards(0.99, 2) == pytest.approx([0.96, 0.98, 0.99])
    assert steps_towards(0.75, 1) == [0.5, 0.75]
    # Half of a model is no step on the way to more of it.
    assert steps_towards(0.75, 3) == [0.5, 0.75]
    assert steps_towards(0.5, 3) == [0.5]
    assert steps_towards(0.0, 2) == [0.0]
    assert steps_towards(0.875, 3, start=0.6) == [0.75, 0.875]


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_steps_are_those_of_prunes_in_a_row(name):
    """Each sparsity begins with the dense model, whatever was made of it before, and is the work of plain prunes."""
    recalibrates = name == "ResNet"
    model = build(name)
    batches = random_batches(model, 8)
    compressor = CAPCompressor(model, CONFIG, disable_tqdm=True, refits=True)
    reports = prune_in_steps(compressor, batches, [0.75, 0.9], 1, recalibrates)
    found = []
    for sparsity, report in zip([0.75, 0.9], reports, strict=True):
        assert report.sparsity == pytest.approx(sparsity, abs=1e-3)
        found.append({key: value.clone() for key, value in model.state_dict().items()})
        # As healing moves it between two sparsities.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    for weights, (first, last) in zip(found, [(0.5, 0.75), (0.8, 0.9)], strict=True):
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
        prune_in_steps(compressor, batches, [0.7, 0.4], 2)


@pytest.mark.parametrize(
    ("changes", "arguments", "line"),
    [
        ({}, (random_batches, [0.5], -1), "num_recomputations=-1 must be at least 0"),
        ({}, (random_batches, [0.5], 1.5), "num_recomputations=1.5 is of type float"),
        ({}, (random_batches, 0.5, 1), "sparsities=0.5 is of type float"),
        ({}, (random_batches, [0.5, 1.5], 1), "1.5"),
        ({}, (lambda *args: iter(random_batches(*args)), [0.5], 1), "steps go through the examples again"),
        ({"allocation": "2:4"}, (random_batches, [0.5], 1), "2:4 has no sparsities on the way"),
        ({"method": "magnitude"}, (random_batches, [0.5], 1), "collects nothing that could be anew"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(changes, arguments, line, monkeypatch):
    model = build("ViT")
    make, *others = arguments
    compressor = CAPCompressor(model, replace(CONFIG, **changes), disable_tqdm=True)
    monkeypatch.setattr(CAPCompressor, "collect", None)
    with pytest.raises(CAPError, match=line):
        prune_in_steps(compressor, make(model, 8), *others)


def test_all_steps_have_the_blocks_of_the_first(monkeypatch):
    """Else what the first has left in memory would change the result of the second."""
    sizes, own = [], planning.available_bytes
    left = iter([10**12, 10**12, 0, 0])

    def less_and_less(resources, device):
        return own(resources, device) if next(left) else 6 * 10**5

    monkeypatch.setattr(planning, "available_bytes", less_and_less)
    model = build("ViT")
    config = replace(CONFIG, fisher_block_size="auto")
    compressor = CAPCompressor(model, config, resources=Resources(spill_dir="none"), disable_tqdm=True)
    for _ in prune_in_steps(compressor, random_batches(model, 8), [0.5, 0.75], 0):
        sizes.append(compressor.plan.block_size)
    assert sizes == ["row", "row"]
    assert compressor.config.fisher_block_size == "row"


@pytest.mark.parametrize(("start", "target", "pattern"), [(0.7, 0.9, "1x4"), (0.6, 0.9, "1x8"), (0.5, 0.5, "1x2")])
def test_steps_of_blocks_begin_with_single_zeros(start, target, pattern):
    """These stay and come on top: the next step may find more zeros than the one before was asked for."""
    model = build("ViT")
    CAPCompressor(model, CAPConfig(method="magnitude")).prune(start)
    batches = random_batches(model, 8, sizes=(8, 8))
    compressor = CAPCompressor(model, CAPConfig(num_grads=16, pattern=pattern))
    (report,) = prune_in_steps(compressor, batches, [target], 2)
    size = int(pattern[2:])
    blocks = sum(layer.num_weights for layer in report.layers) // size
    assert sum(layer.zero_blocks[pattern] for layer in report.layers) == round(target * blocks)
    assert report.sparsity >= target
