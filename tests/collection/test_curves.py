"""What the removals of a model cost, from the first to the last: compared with a plain sort of all of them."""

import pytest
import torch
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.curves import removal_curve
from cap_hf.method.allocation import path_losses
from cap_hf.patterns import unit_of


def pruned(model=None, sparsity=0.5, **config) -> CAPCompressor:
    """A compressor whose removal paths are there."""
    model = model or build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=8, **config)).collect(random_batches(model, 8))
    compressor.prune(sparsity)
    return compressor


def by_sorting(compressor: CAPCompressor, points: int) -> dict:
    """The curve with every removal of the model in one sorted list."""
    paths, config = compressor.paths, compressor.config
    unit = unit_of(config.structure)
    removals = []
    for target in paths.targets:
        losses, weights = paths.losses[target.name], paths.weights[target.name]
        zeros = (weights == 0).unflatten(1, (-1, unit)).all(dim=2).sum(dim=1)
        compared = path_losses(losses, zeros, config.selection)
        for loss, key in zip(losses.flatten().tolist(), compared.flatten().tolist(), strict=True):
            removals.append((key, target.name, max(loss, 0.0) if key else 0.0))
    removals.sort(key=lambda each: each[0])
    sizes = {target.name: target.weight.numel() // unit for target in paths.targets}
    curve: dict = {"sparsity": [], "marginal": [], "total": [], "layers": {name: [] for name in sizes}}
    for point in range(1, points + 1):
        sparsity = point / (points + 1)
        gone = removals[: max(1, round(sparsity * sum(sizes.values())))]
        curve["sparsity"].append(sparsity)
        curve["marginal"].append(gone[-1][0])
        curve["total"].append(sum(loss for _, _, loss in gone))
        for name, size in sizes.items():
            curve["layers"][name].append(sum(name == own for _, own, _ in gone) / size)
    return curve


@pytest.mark.parametrize(
    "config", [{}, {"selection": "cumulative"}, {"pattern": "1x4"}, {"method": "magnitude"}, {"allocation": "uniform"}]
)
def test_the_curve_is_that_of_all_removals_sorted(config):
    compressor = pruned(**config)
    found, expected = removal_curve(compressor.paths, compressor.config, 20), by_sorting(compressor, 20)
    assert found["sparsity"] == pytest.approx(expected["sparsity"], abs=1e-4)
    # Losses are those of bins of 3 %.
    assert found["marginal"] == pytest.approx(expected["marginal"], rel=0.03)
    assert found["total"] == pytest.approx(expected["total"], rel=0.05)
    for name, shares in expected["layers"].items():
        assert found["layers"][name] == pytest.approx(shares, abs=0.05), name


def test_what_is_0_already_costs_nothing():
    model = build("ViT")
    first = CAPCompressor(model).targets[0]
    with torch.no_grad():
        first.weight.zero_()
    compressor = pruned(model)
    found = removal_curve(compressor.paths, compressor.config, 50)
    share = first.weight.numel() / sum(target.weight.numel() for target in compressor.targets)
    for sparsity, marginal, total in zip(found["sparsity"], found["marginal"], found["total"], strict=True):
        assert (marginal == 0) == (total == 0) == (sparsity < share)


def test_nothing_is_compared_in_groups_of_n_of_m():
    compressor = pruned(sparsity=None, allocation="2:4")
    assert removal_curve(compressor.paths, compressor.config) is None
