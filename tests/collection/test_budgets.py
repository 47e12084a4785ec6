"""Models pruned to budgets: what they are asked for against what is counted of them, written and told."""

import dataclasses
import itertools

import pytest
import torch
from support.checkpoints import make_model
from support.latencies import said, true_share
from support.models import ARCHITECTURES, build, random_batches
from torch.utils.flop_counter import FlopCounterMode

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.budget import Budget
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.sizes import measure_model
from cap_hf.checkpoints.weights import measure
from cap_hf.collection import budgets
from cap_hf.collection.closing import TOLERANCE
from cap_hf.inference.latency import Measured
from cap_hf.stepwise import prune_in_steps
from cap_hf.targets import find_targets


def compressor_of(model, side, **config) -> CAPCompressor:
    settings = CAPConfig(**{"num_grads": 16, **config})
    return CAPCompressor(model, settings, disable_tqdm=True).collect(random_batches(model, side, sizes=(8, 8)))


@pytest.fixture
def said_times(monkeypatch):
    """What layers and models take is told, and not measured."""
    said(monkeypatch.setattr)


def multiply_adds(model, side, targets) -> tuple[int, int]:
    """Of the targets: those that are kept, and all, by PyTorch's counter of operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=random_batches(model, side, sizes=(1,))[0]["pixel_values"])
    counted = counter.get_flop_counts()
    kept = total = 0
    for target in targets:
        dense = sum(counted[f"{type(model).__name__}.{target.name}"].values()) // 2
        total += dense
        kept += dense // target.weight.numel() * int((target.weight != 0).sum())
    return kept, total


def multiply_adds_or_bytes(compressor, kind) -> int:
    """What a model takes as it is."""
    if kind == "bytes":
        return measure_model(compressor.model)[1]
    sides = compressor.model.config.image_size
    return multiply_adds(compressor.model, sides, compressor.targets)[0]


@pytest.mark.parametrize("name", ["ViT", "Swin", "ConvNext", "ResNet"])
def test_multiply_adds_are_met_as_nearly_as_weights_can(name):
    side = ARCHITECTURES[name][1]
    model = build(name)
    compressor = compressor_of(model, side)
    for share in (0.4, 0.25):
        report = compressor.prune(Budget("flops", share, random_batches(model, side, sizes=(1,))[0]))
        kept, total = multiply_adds(model, side, compressor.targets)
        assert (report.budget.kept, report.budget.dense) == (kept, total)
        assert report.budget.achieved == kept / total <= share
        # Less is left over than any weight that went costs.
        assert share * total - kept < max(1, total / sum(each.weight.numel() for each in compressor.targets)) * 4
        assert report.requested_sparsity is None
        assert report.to_dict()["budget"]["requested"] == share


def test_where_weights_cost_more_more_of_them_go():
    """Beside a sparsity with the same multiply-adds the loss that is foreseen is less, and more weights are left."""
    model = build("Swin")
    compressor = compressor_of(model, 16)
    budget = compressor.prune(Budget("flops", 0.3))
    shares = [layer.sparsity for layer in budget.layers]
    low, high = budget.sparsity, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        plain = compressor.prune(middle)
        kept, total = multiply_adds(model, 16, compressor.targets)
        low, high = (low, middle) if kept / total <= 0.3 else (middle, high)
    plain = compressor.prune(high)
    assert plain.sparsity > budget.sparsity
    assert plain.loss > budget.loss
    early = [index for index, layer in enumerate(budget.layers) if ".layers.0." in layer.name]
    assert sum(shares[index] for index in early) > sum(plain.layers[index].sparsity for index in early)


def test_one_price_for_all_is_a_sparsity():
    model = build("ViT")
    compressor = compressor_of(model, 8, exclude=["*attention*"])
    compressor.prune(Budget("flops", 0.5))
    found = {target.name: target.weight.clone() for target in compressor.targets}
    compressor.prune(0.5)
    assert all(torch.equal(target.weight, found[target.name]) for target in compressor.targets)


@pytest.mark.parametrize("pattern", [None, "1x4"])
def test_bytes_are_those_of_the_compressed_checkpoint(tmp_path, pattern):
    model = make_model()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", pattern=pattern), disable_tqdm=True)
    for share in (0.6, 0.3):
        report = compressor.prune(Budget("bytes", share))
        compressor.save_pretrained(tmp_path / f"{share}")
        compress_checkpoint(tmp_path / f"{share}", tmp_path / f"small-{share}")
        dense, compressed = measure(tmp_path / f"small-{share}")
        assert (report.budget.kept, report.budget.dense) == (compressed, dense)
        assert 0.99 * share <= report.budget.achieved <= share


def test_bytes_are_those_in_the_dtype_that_it_is_saved_in(tmp_path):
    model = make_model()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True, dtype=torch.bfloat16)
    report = compressor.prune(Budget("bytes", 0.5))
    compressor.save_pretrained(tmp_path / "plain")
    dense, compressed = measure(tmp_path / "plain")
    assert (report.budget.kept, report.budget.dense) == (compressed, dense)
    assert 0.99 * 0.5 <= report.budget.achieved <= 0.5


def test_units_are_kept_or_removed_as_a_whole():
    model = make_model()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", pattern="1x4"), disable_tqdm=True)
    report = compressor.prune(Budget("flops", 0.4))
    for target in compressor.targets:
        units = target.to_blocks(target.weight.detach()).view(-1, 4) == 0
        assert torch.equal(units.any(dim=1), units.all(dim=1))
    assert 0.399 < report.budget.achieved <= 0.4


def test_a_latency_is_measured_and_spent_again_until_it_is_what_was_asked_for(said_times):
    model = build("ViT")
    compressor = compressor_of(model, 8)
    lines = []
    compressor.progress.say = lines.append
    for share in (0.6, 0.45):
        report = compressor.prune(Budget("latency", share)).budget
        assert report.achieved == pytest.approx(share, rel=TOLERANCE)
        assert report.achieved == pytest.approx(true_share(model), abs=1e-12)
        # The layers alone say something else.
        assert abs(report.predicted - share) > TOLERANCE * share
        assert (report.error, report.dense, report.counted_in) == (1e-4, 14.0, "seconds")
        assert report.kept == pytest.approx(14.0 * report.achieved)
        assert report.threads == torch.get_num_threads()
        assert lines[-1].startswith(f"latency={share}: asked {share:.4f} of the dense latency, predicted ")
        # Layers where little is gained are left alone, the others go far beyond where they begin to gain.
        assert all(layer.sparsity == 0 or layer.sparsity > 0.6 for layer in compressor.report.layers)
    assert sum("try 1:" in line for line in lines) == 2


def test_a_latency_that_no_zeros_reach_says_what_was_measured(said_times):
    compressor = CAPCompressor(build("ViT"), CAPConfig(method="magnitude"), disable_tqdm=True)
    with pytest.raises(CAPError, match="latency=0.2 cannot be met: with every target 0, 24.3% of the dense latency"):
        compressor.check_sparsity(Budget("latency", 0.2))


def test_a_model_that_is_faster_already_is_not_pruned_to_a_larger_latency(said_times):
    model = build("ViT")
    CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True).prune(0.9)
    again = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    now = true_share(model)
    with pytest.raises(CAPError, match=f"the model takes {now:.4%} of the dense latency here, .* latency=0.9 would be"):
        again.prune(Budget("latency", 0.9))
    assert again.prune(Budget("latency", 0.3)).budget.achieved == pytest.approx(0.3, rel=TOLERANCE)


def test_a_try_that_comes_near_by_chance_is_not_the_last(said_times, monkeypatch):
    """The first model is measured to take just what was asked for; measured again, it takes what it does."""
    compressor = CAPCompressor(build("ViT"), CAPConfig(method="magnitude"), disable_tqdm=True)
    compressor.check_sparsity(Budget("latency", 0.6))
    by_chance, measure_share = [Measured(0.6, 1e-4)], budgets.measure_share
    monkeypatch.setattr(budgets, "measure_share", lambda *args: by_chance.pop() if by_chance else measure_share(*args))
    report = compressor.prune(Budget("latency", 0.6)).budget
    assert not by_chance
    assert report.achieved == pytest.approx(0.6, rel=TOLERANCE)


def test_what_comes_in_jumps_is_told(said_times, monkeypatch, caplog):
    def coarse(model, pruned, *args):
        return round(2 * true_share(pruned)) / 2, 1e-4

    monkeypatch.setattr(budgets, "measure_share", coarse)
    CAPCompressor(build("ViT"), CAPConfig(method="magnitude"), disable_tqdm=True).prune(Budget("latency", 0.7))
    assert "latency=0.7 is undercut: measured 0.5000 ± 0.0001, as layers become faster in jumps" in caplog.text


def test_a_last_measurement_that_says_something_else_is_told(said_times, monkeypatch, caplog):
    compressor = CAPCompressor(build("ViT"), CAPConfig(method="magnitude"), disable_tqdm=True)
    compressor.check_sparsity(Budget("latency", 0.6))
    spend = budgets.Budgets.spend

    def and_slower(*args):
        found = spend(*args)
        monkeypatch.setattr(budgets, "measure_share", lambda *args: (0.66, 0.01))
        return found

    monkeypatch.setattr(budgets.Budgets, "spend", and_slower)
    assert compressor.prune(Budget("latency", 0.6)).budget.achieved == 0.66
    assert "latency=0.6 is exceeded: measured 0.6600 ± 0.0100" in caplog.text


def test_no_model_that_is_slower_than_the_dense_one_is_given(said_times, monkeypatch):
    # The first to be measured has nothing left in its targets.
    shares = itertools.chain([0.2], itertools.repeat(1.25))
    monkeypatch.setattr(budgets, "measure_share", lambda *args: (next(shares), 1e-4))
    model = build("ViT")
    with pytest.raises(CAPError, match=r"latency=0.9 cannot be met: of \d models none was faster than the dense one"):
        CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True).prune(Budget("latency", 0.9))
    assert all((target.weight != 0).all() for target in find_targets(model))


def test_layers_of_which_none_gains_alone_are_told_before_the_work(said_times, monkeypatch):
    def flat(model, targets, example, int8, unit, advance):
        return [[(0, 1.0), (each.weight.numel() // unit, 1.0)] for each in targets], 2.0, 2.0 + len(targets)

    monkeypatch.setattr(budgets, "latency_points", flat)
    compressor = CAPCompressor(build("ViT"), CAPConfig(method="magnitude"), disable_tqdm=True)
    with pytest.raises(CAPError, match="latency=0.7 cannot be spent: no layer alone was measured to be faster"):
        compressor.check_sparsity(Budget("latency", 0.7))


@pytest.mark.parametrize(
    ("budget", "config", "line"),
    [
        (Budget("flops", 0.4), {"allocation": "2:4"}, "allocation=2:4 says how much each target keeps"),
        (Budget("flops", 0.4), {"allocation": "uniform"}, "allocation=uniform says how much each target keeps"),
        (Budget("flops", 0.4), {"selection": "cumulative"}, "selection=cumulative has no loss of a single removal"),
        (Budget("bytes", 0.001), {}, r"bytes=0.001 cannot be met: with every target 0, \d+.\d% of the dense bytes"),
    ],
)
def test_what_cannot_be_is_one_line_before_the_work(budget, config, line):
    compressor = CAPCompressor(make_model(), CAPConfig(**config), disable_tqdm=True)
    with pytest.raises(CAPError, match=line):
        compressor.check_sparsity(budget)


def test_a_sparse_model_is_pruned_further_and_not_back():
    model = make_model()
    first = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    first.prune(Budget("flops", 0.5))
    zeros = {target.name: target.weight == 0 for target in first.targets}
    again = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    with pytest.raises(CAPError, match="takes 50.0000% of the targets' multiply-adds already: flops=0.7 would be more"):
        again.check_sparsity(Budget("flops", 0.7))
    report = again.prune(Budget("flops", 0.3))
    assert 0.299 < report.budget.achieved <= 0.3
    assert all((target.weight[zeros[target.name]] == 0).all() for target in again.targets)
    # From the same collection, a larger one after a smaller one.
    first.prune(Budget("flops", 0.2))
    assert 0.399 < first.prune(Budget("flops", 0.4)).budget.achieved <= 0.4


@pytest.mark.parametrize("kind", ["flops", "bytes"])
def test_zeros_that_do_not_keep_to_the_pattern_are_one_line(kind):
    """A block of which half is 0 would be charged as a whole, and far more be pruned than was asked for."""
    model = make_model()
    CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True).prune(0.4)
    blocks = CAPCompressor(model, CAPConfig(method="magnitude", pattern="1x4"), disable_tqdm=True)
    line = (
        f"^{kind}=0.5 counts whole blocks of 1x4, and 3\\d.\\d% of the weights are zeros that lie in blocks with others"
    )
    with pytest.raises(CAPError, match=line):
        blocks.check_sparsity(Budget(kind, 0.5))
    with pytest.raises(CAPError, match=line):
        blocks.prune(Budget(kind, 0.5))
    assert blocks.prune(0.5).sparsity > 0.5


@pytest.mark.parametrize("kind", ["flops", "bytes"])
def test_a_few_zeros_in_blocks_count_as_what_they_are(kind):
    model = make_model()
    CAPCompressor(model, CAPConfig(method="magnitude", pattern="1x4"), disable_tqdm=True).prune(0.6)
    blocks = CAPCompressor(model, CAPConfig(method="magnitude", pattern="1x4"), disable_tqdm=True)
    for target in blocks.targets:
        kept = target.weight.detach().view(-1, 4)
        rows = kept.all(dim=1).nonzero()[:, 0]
        kept[rows[: len(rows) // 20], 0] = 0  # 0.5 % of all weights
    now = blocks.budgets.costs(Budget(kind, 0.5), blocks.targets, 4)
    real = multiply_adds_or_bytes(blocks, kind) / now.dense
    # Between the real share and the one of whole blocks.
    with pytest.raises(CAPError, match=f"the model takes {real:.4%}".replace("%", "% of .* already")):
        blocks.check_sparsity(Budget(kind, real + 1e-3))
    report = blocks.prune(Budget(kind, 0.3)).budget
    assert 0.29 < report.achieved <= 0.3


def test_there_are_no_steps_towards_a_budget():
    compressor = CAPCompressor(make_model(), CAPConfig(), disable_tqdm=True)
    with pytest.raises(CAPError, match="flops=0.4 has no sparsities on the way to it"):
        prune_in_steps(compressor, [], [Budget("flops", 0.4)], 1)


def test_the_example_says_how_large_images_are():
    model = build("Swin", image_size=16)
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    own = compressor.budgets.costs(Budget("flops", 0.5), compressor.targets, 1)
    larger = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True).budgets
    image = {"pixel_values": torch.randn(1, 3, 32, 32)}
    budget = dataclasses.replace(Budget("flops", 0.5), example_inputs=image)
    assert larger.costs(budget, compressor.targets, 1).dense == 4 * own.dense
