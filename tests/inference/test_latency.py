"""Predicted seconds, with a clock that shows what every layer is said to take: no test goes by what a machine takes."""

import functools
import statistics
from functools import partial

import pytest
import torch
from support.models import build, random_batches
from torch import nn

from cap_hf.inference import latency
from cap_hf.inference.benchmark import PAUSE
from cap_hf.inference.int8_linear import DenseInt8Linear, SparseInt8Linear
from cap_hf.inference.latency import latency_points, measure_share, median_with_error, relative_times, sparse_layers
from cap_hf.inference.linear import SparseLinear
from cap_hf.inference.optimize import optimize_for_inference
from cap_hf.targets import find_targets


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A few turns are enough for what is said of the clock."""
    monkeypatch.setattr(latency, "RUNS", 4)
    relative_times.cache_clear()
    yield
    relative_times.cache_clear()


def density(layer) -> float:
    return float((layer.weight != 0).float().mean())


def said_times(monkeypatch, seconds):
    """Layers take what a function says of them; returns those that were timed."""
    timed = []

    def time_in_turns(calls, *args, **kwargs):
        layers = [call.func for call in calls]
        timed.extend(layers)
        return [[seconds(layer)] * 4 for layer in layers]

    monkeypatch.setattr(latency, "time_in_turns", time_in_turns)
    return timed


def test_a_layer_is_predicted_in_the_form_that_would_be_chosen(monkeypatch):
    # The sparse product takes as long as a dense one does where half of the weights are left.
    timed = said_times(monkeypatch, lambda layer: 2 * density(layer) if isinstance(layer, SparseLinear) else 1.0)
    curve = dict(relative_times(64, 48, 9, True, False, 1, 1))
    assert {type(layer) for layer in timed} == {nn.Linear, SparseLinear}
    assert [curve[sparsity] for sparsity in (0.0, 0.2, 0.5)] == [1.0, 1.0, 1.0]
    # Dense to the end, and not half way to the other form.
    assert curve[0.6 - latency.NEAR] == 1.0
    assert curve[0.6] == pytest.approx(0.8, abs=0.05)
    assert curve[0.75] == pytest.approx(0.5, abs=0.05)
    assert curve[1.0] == 0.0
    assert list(curve.values()) == sorted(curve.values(), reverse=True)


def test_noise_makes_no_layer_slower_with_more_zeros_and_a_gain_in_doubt_is_none(monkeypatch):
    said = {0.8: 0.4, 0.9: 0.7, 0.6: 0.96}

    def seconds(layer):
        return said.get(round(1 - density(layer), 1), 0.96) if isinstance(layer, SparseLinear) else 1.0

    said_times(monkeypatch, seconds)
    curve = dict(relative_times(64, 48, 9, True, False, 1, 1))
    assert (curve[0.6], curve[0.7]) == (1.0, 1.0)
    assert curve[0.8] == curve[0.9] == curve[1.0] == 0.4


def test_in_int8_the_fastest_of_all_forms_counts_and_blocks_are_whole_words(monkeypatch):
    shares = {nn.Linear: 1.0, SparseLinear: 0.9, DenseInt8Linear: 0.5}
    monkeypatch.setattr(latency, "has_dense_int8", lambda: True)
    monkeypatch.setattr(latency, "DenseInt8Linear", functools.partial(labelled, DenseInt8Linear))
    words = []

    def seconds(layer):
        if isinstance(layer, SparseInt8Linear):
            words.append(float((layer.weight.view(-1, 4) == 0).all(dim=1).float().mean()) - (1 - density(layer)))
            return 2 * density(layer)
        return shares[getattr(layer, "label", type(layer))]

    said_times(monkeypatch, seconds)
    curve = dict(relative_times(64, 48, 9, True, True, 4, 1))
    assert (curve[0.0], curve[0.01], curve[0.5]) == (1.0, 0.5, 0.5)
    assert curve[0.9] == pytest.approx(0.2, abs=0.05)
    # Zeros in words that are not 0 as a whole are those that rounding has made.
    assert max(map(abs, words)) < 0.02


def labelled(kind, linear):
    """A layer that is called as another one: there is no dense int8 on every machine."""
    layer = nn.Linear(linear.in_features, linear.out_features)
    layer.label = kind
    return layer


def test_a_models_seconds_are_those_of_its_layers_and_of_the_rest(monkeypatch):
    model = build("ViT")
    targets = find_targets(model)
    example = random_batches(model, 8, sizes=(1,))[0]
    now = [0.0]
    monkeypatch.setattr(latency, "clock", lambda: now[0])
    of_fc1 = {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"}
    places = []

    def takes(seconds):
        def hook(*args):
            now[0] += seconds

        return hook

    copied = latency.on_cpu

    def slow(model):
        made = copied(model)
        for name in of_fc1:
            # Before the watch's own hooks end, inside the layer.
            made.get_submodule(name).forward = functools.partial(run, made.get_submodule(name).forward)
        made.classifier.register_forward_hook(takes(3.0))
        places.append(made)
        return made

    def run(forward, *args):
        now[0] += 1.0
        return forward(*args)

    monkeypatch.setattr(latency, "on_cpu", slow)
    monkeypatch.setattr(latency, "relative_times", lambda *args: ((0.0, 1.0), (0.5, 1.0), (1.0, 0.25)))
    done = []
    points, rest, dense = latency_points(model, targets, example, False, 1, done.append)
    assert (rest, dense) == (3.0, 5.0)
    assert sum(done) == len(targets)
    found = dict(zip([target.name for target in targets], points, strict=True))
    assert found["vit.layers.0.mlp.fc1"] == [(0, 1.0), (256, 1.0), (512, 0.25)]
    assert found["vit.layers.0.attention.q_proj"] == [(0, 0.0), (128, 0.0), (256, 0.0)]
    assert model.vit.layers[0].mlp.fc1.forward.__func__ is nn.Linear.forward


def test_convolutions_and_shared_weights_stay_dense():
    assert sparse_layers(find_targets(build("ResNet")), False) == []
    model = build("ViT")
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    names = sparse_layers(find_targets(model), False)
    assert "vit.layers.0.mlp.fc2" in names
    assert "vit.layers.0.mlp.fc1" not in names
    model = build("ResNet")
    points, rest, dense = latency_points(model, find_targets(model), random_batches(model, 16)[0], False, 1)
    assert rest == dense
    assert all(cost == 0 for each in points for _, cost in each)


def test_a_pruned_model_is_measured_beside_the_dense_one_in_turns(monkeypatch):
    model, timed = build("ViT"), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example = random_batches(model, 8, sizes=(1,))[0]
    bouts = iter([[2.0, 4.0, 8.0], [2.0, 4.0, 8.0]])

    def time_in_turns(calls, runs, seconds, pause=0.0, warm=False):
        timed.append([call.args[0] for call in calls])
        assert pause == PAUSE
        return [[4.0] * 3, next(bouts)]

    pruned = prune_some(model)
    # Faster or not, the sparse layer is there.
    monkeypatch.setattr(latency, "optimize_for_inference", partial(optimize_for_inference, backend="kernel"))
    monkeypatch.setattr(latency, "time_in_turns", time_in_turns)
    monkeypatch.setattr(latency, "BOUTS", 2)
    share, error = measure_share(model, pruned, example, False)
    # Half, as much and twice of each bout; both are needed, as the error is large.
    assert share == 1.0
    assert error == median_with_error([0.5, 1.0, 2.0] * 2).error > 0
    assert len(timed) == 2
    assert type(timed[0][0].vit.layers[0].mlp.fc1) is nn.Linear
    assert type(timed[0][1].vit.layers[0].mlp.fc1) is SparseLinear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_zeros_takes_what_it_takes(monkeypatch):
    model = build("ViT")
    example = random_batches(model, 8, sizes=(1,))[0]
    assert measure_share(model, latency.on_cpu(model), example, False) == (1.0, 0.0)
    almost = latency.on_cpu(model)
    with torch.no_grad():
        almost.vit.layers[0].mlp.fc1.weight[0, 0] = 0
    assert measure_share(model, almost, example, True) == (1.0, 0.0)


def test_the_error_of_a_median_is_how_far_medians_lie_apart():
    generator = torch.Generator().manual_seed(0)
    # Times have a long tail on one side.
    samples = torch.randn(400, 100, generator=generator).exp()
    found = [median_with_error(each.tolist()) for each in samples]
    medians = torch.tensor([each.share for each in found])
    assert statistics.median(samples[0].tolist()) == pytest.approx(found[0].share)
    assert statistics.fmean(each.error for each in found) == pytest.approx(float(medians.std()), rel=0.15)
    assert median_with_error([1.0]) == (1.0, float("inf"))


def prune_some(model):
    pruned = latency.on_cpu(model)
    with torch.no_grad():
        pruned.vit.layers[0].mlp.fc1.weight[:16] = 0
    return pruned
