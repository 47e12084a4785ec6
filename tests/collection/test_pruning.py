"""Several sparsities from one collection, also where its sums are collected anew."""

import gc
import weakref

import pytest
import torch
from support.models import build, random_batches
from support.short_memory import loader, squeeze, sums_of

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.solver import Solver
from cap_hf.method.sums import SymmetricSums
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


@pytest.mark.parametrize("anew", [False, True])
def test_a_model_that_was_trained_is_pruned_as_it_was_at_collect(monkeypatch, anew):
    """Its layers that is; what is no target keeps what training made of it."""
    squeeze(monkeypatch, 1.0 if anew else 100.0, anew, block_size="row")
    model, expected = build("ViT"), one_pass()
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
    compressor.prune(0.5)
    norm = model.vit.layernorm.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    trained = norm.clone()
    compressor.prune(0.7)
    assert torch.equal(norm, trained)
    for target in compressor.targets:
        assert torch.equal(target.weight, expected[1][f"{target.name}.weight"])
        assert torch.equal(target.module.bias, expected[1][f"{target.name}.bias"])


@pytest.mark.parametrize("kind", ["error", "Ctrl-C"])
def test_a_prune_that_fails_leaves_the_model_as_it_was(monkeypatch, kind):
    squeeze(monkeypatch, 1.0, anew=True, block_size="row")
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
    compressor.prune(0.5)
    compressor.refit(loader(model, 24, batch_size=8))
    before, step, calls = weights_of(model), GradientSums.step, []

    def failing(*args) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise CAPError("what must not be") if kind == "error" else KeyboardInterrupt
        step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(GradientSums, "step", failing)
        with pytest.raises((CAPError, KeyboardInterrupt)):
            compressor.prune(0.7)
    assert_equal([weights_of(model)], [before])
    compressor.prune(0.7)
    assert_equal([weights_of(model)], [one_pass()[1]])


def test_other_examples_than_the_first_time_are_refused(monkeypatch):
    squeeze(monkeypatch, 1.0, anew=True, block_size="row")
    model = build("ViT")
    batches = random_batches(model, 8, sizes=(8, 8, 8))
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(batches)
    batches[1]["pixel_values"][0] += 1
    with pytest.raises(CAPError, match="the examples differ from those of the pass before, .* that does not change"):
        compressor.prune(0.7)


def test_the_sums_of_one_group_are_in_memory_without_the_help_of_the_garbage_collector(monkeypatch):
    squeeze(monkeypatch, 1.0, anew=True, block_size="row")
    model, alive, zeros = build("ViT"), weakref.WeakSet(), SymmetricSums.zeros.__func__

    def noted(kind, *args):
        # Of another group nothing may be left when a group begins.
        made = zeros(kind, *args)
        alive.add(made)
        return made

    largest = []
    monkeypatch.setattr(SymmetricSums, "zeros", classmethod(noted))
    step = GradientSums.step
    monkeypatch.setattr(GradientSums, "step", lambda *args: (largest.append(sum(map(size_of, alive))), step(*args))[1])
    gc.collect()
    gc.disable()
    try:
        compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
        compressor.prune(0.7)
        compressor.collect(loader(model, 24, batch_size=8))
    finally:
        gc.enable()
    groups = [sums_of(targets) for targets in compressor.plan.passes]
    assert len(groups) > 1
    assert max(groups) // 2 < max(largest) < 1.5 * max(groups) < sum(groups)


def size_of(sums: SymmetricSums) -> int:
    return sum(strip.nbytes for strip in sums.strips)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pruning_twice_rounds_as_in_one_pass(monkeypatch, dtype):
    found = []
    for anew in (False, True):
        squeeze(monkeypatch, 1.0 if anew else 100.0, anew, block_size="row")
        model = build("ViT")
        compressor = CAPCompressor(model, CAPConfig(num_grads=24), dtype=dtype)
        compressor.collect(loader(model, 24, batch_size=8))
        for sparsity in SPARSITIES:
            compressor.prune(sparsity)
            found.append(weights_of(model))
    assert_equal(found[:3], found[3:])


def test_inside_inference_mode_a_group_is_collected_again(monkeypatch):
    squeeze(monkeypatch, 1.0, anew=True, block_size="row")
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
    with torch.inference_mode():
        compressor.prune(0.7)
    assert_equal([weights_of(model)], [one_pass()[1]])


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


def test_elimination_alone_multiplies_in_float32_whatever_was_set(monkeypatch):
    """After `--tf32` its products had three digits on CUDA; the model's passes, also those in between, stay in TF32."""
    matmul, seen = torch.backends.cuda.matmul, {"eliminating": set(), "collecting": set()}

    def noting(phase, call):
        return lambda *args: (seen[phase].add(matmul.fp32_precision), call(*args))[1]

    monkeypatch.setattr(Solver, "eliminate", noting("eliminating", Solver.eliminate))
    model, before = build("ViT"), matmul.fp32_precision
    model.vit.layers[0].register_forward_hook(noting("collecting", lambda *args: None))
    squeeze(monkeypatch, 1.0, True, block_size="row")
    matmul.fp32_precision = "tf32"
    try:
        compressor = CAPCompressor(model, CAPConfig(num_grads=24)).collect(loader(model, 24, batch_size=8))
        compressor.prune(0.5)
    finally:
        matmul.fp32_precision = before
    assert compressor.plan.recollects
    assert seen == {"eliminating": {"ieee"}, "collecting": {"tf32"}}
