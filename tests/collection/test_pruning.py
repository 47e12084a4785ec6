"""Several sparsities from one collection, also where its sums are collected anew."""

import pytest
import torch
from support.models import build, random_batches
from support.short_memory import loader, squeeze

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.targets import find_targets

SPARSITIES = (0.5, 0.7, 0.9)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Grows by 1 with each step of a collection."""
    noted, step = [], GradientSums.step
    monkeypatch.setattr(GradientSums, "step", lambda *args: (noted.append(1), step(*args))[1])
    return noted


def one_pass(change=lambda model: None, **config) -> list[dict]:
    """What each sparsity gives where everything fits into memory."""
    model, found = build("ViT"), []
    change(model)
    compressor = CAPCompressor(model, CAPConfig(num_grads=24, **config)).collect(loader(model, 24, batch_size=8))
    for sparsity in SPARSITIES:
        compressor.prune(sparsity)
        found.append(weights_of(model))
    return found


@pytest.mark.parametrize("anew", [False, True])
def test_several_sparsities_take_the_passes_of_one_and_a_model_may_be_trained_between_them(monkeypatch, steps, anew):
    expected = one_pass()
    steps.clear()
    squeeze(monkeypatch, 1.0 if anew else 100.0, anew, block_size="row")
    model, found, reports = build("ViT"), [], []
    compressor = CAPCompressor(model, CAPConfig(num_grads=24), prunes=3).collect(loader(model, 24, batch_size=8))
    assert compressor.plan.recollects == anew
    for report in compressor.prune_each(SPARSITIES):
        found.append(weights_of(model))
        reports.append(report.sparsity)
        with torch.no_grad():
            for target in compressor.targets:
                target.weight.mul_(2.0)
                target.module.bias.add_(1.0)
    assert_equal(found, expected)
    assert reports == pytest.approx(SPARSITIES, abs=1e-3)
    # Each pass twice, but for the one that the elimination ends with.
    assert len(steps) == 3 * compressor.plan.num_passes
    assert compressor.plan.num_passes == (2 * len(compressor.plan.passes) - 1 if anew else 1)


def test_a_model_that_is_another_one_is_not_collected_from_again(monkeypatch):
    squeeze(monkeypatch, 0.9, anew=True, block_size="row")
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
    compressor.prune(0.5)
    with torch.no_grad():
        model.vit.layernorm.weight.add_(0.1)
    with pytest.raises(CAPError, match="the model has changed since collect, .* with prune_each, or collect again"):
        compressor.prune(0.7)


def test_targets_without_a_gradient_are_damped_as_in_one_pass(monkeypatch):
    """They take the mean damp of all others, which the first passes do not know yet."""

    def silence(model) -> None:
        # What comes out of fc1 goes nowhere.
        model.vit.layers[0].mlp.fc2.weight.data.zero_()

    expected = one_pass(silence)
    squeeze(monkeypatch, 0.9, anew=True, block_size="row")
    model, found = build("ViT"), []
    silence(model)
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
    assert "vit.layers.0.mlp.fc1" in {target.name for target in compressor.plan.passes[0]}
    assert len(compressor.plan.passes) > 1
    for _ in compressor.prune_each(SPARSITIES):
        found.append(weights_of(model))
    assert_equal(found, expected)


def test_another_pattern_goes_through_the_passes_again(monkeypatch, steps):
    expected, model = build("ViT"), build("ViT")
    CAPCompressor(expected, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8)).prune(allocation="2:4")
    squeeze(monkeypatch, 0.9, anew=True, block_size="row")
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
    compressor.prune(0.5)
    steps.clear()
    compressor.prune(allocation="2:4")
    assert_equal([weights_of(model)], [weights_of(expected)])
    assert len(steps) == 3 * compressor.plan.num_passes


def test_what_is_too_large_for_the_dtype_changes_nothing():
    model = build("ViT")
    with torch.no_grad():
        find_targets(model)[0].weight[0, 0] = 1e6
    before = weights_of(model)
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), dtype=torch.float16)
    with pytest.raises(CAPError, match=r"holds 1e\+06, too much for torch.float16"):
        compressor.collect(random_batches(model, 8)).prune(0.5)
    assert_equal([weights_of(model)], [before])
