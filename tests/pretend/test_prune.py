"""Pruning on the accelerator gives what it gives on the CPU, on every path, within the accelerator's memory."""

import gc

import pytest
import torch
from support import pretend
from support.blocks import make_blocks
from support.models import build, random_batches
from support.pretend.runs import CASES, INTERRUPTED, accelerator_on, compress, compress_interrupted, loader, weights
from transformers import AutoModelForImageClassification

from cap_hf import CAPCompressor, CAPConfig, CAPError, Resources
from cap_hf.collection.clock import LAUNCHES
from cap_hf.data.evaluation import evaluate_model
from cap_hf.method import panels
from cap_hf.method.inverses import invert
from cap_hf.report import peak_memory, reset_peak_memory


def assert_same(found, expected, loss: bool = True):
    """The same zeros, weights within rounding, and the same cost."""
    (found, found_report), (expected, expected_report) = found, expected
    assert found_report.num_zeros == expected_report.num_zeros
    if loss:
        assert found_report.loss == pytest.approx(expected_report.loss, rel=1e-4)
    wanted = weights(expected)
    for name, weight in weights(found).items():
        assert torch.equal(weight == 0, wanted[name] == 0), name
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_accelerator_gives_what_the_cpu_gives(name):
    method = CASES[name][1].get("method", "cap")
    expected = compress(name, accelerator_on("cpu"))
    with pretend.count_launches() as counts:
        found = compress(name, accelerator_on("pretend"))
    assert all(target.weight.device.type == "pretend" for target in found[0].targets)
    assert counts.launches["aten::convolution"] or method == "magnitude"
    assert_same(found, expected, loss=method != "magnitude")


def test_several_sparsities_from_one_collection():
    found, expected = (compress("cap", accelerator_on(device))[0] for device in ("pretend", "cpu"))
    for sparsity in (0.8, 0.3):
        assert_same((found, found.prune(sparsity)), (expected, expected.prune(sparsity)))


def test_a_fisher_that_cannot_be_inverted_is_explained_as_on_the_cpu():
    lines = []
    for device in ("cpu", "pretend"):
        model = build("ViT")
        # With its prior the Fisher could be.
        config = CAPConfig(
            num_grads=8, fisher_prior="identity", damp=1e-30, absolute_damp=True, weight_update="independent"
        )
        compressor = CAPCompressor(model, config, accelerator_on(device), disable_tqdm=True)
        with pytest.raises(CAPError, match="--damp") as error:
            compressor.collect(loader(model, 8)).prune(0.5)
        # Rounding decides how much is missing.
        lines.append(str(error.value).split("--damp")[0])
    assert lines[0] == lines[1]


def test_a_loss_that_is_not_finite_is_explained():
    model = build("ViT")
    batches = random_batches(model, 8)
    batches[1]["pixel_values"][0] = torch.nan
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), accelerator_on("pretend"), disable_tqdm=True)
    with pytest.raises(CAPError, match="NaN"):
        compressor.collect(batches)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_collection_goes_on(name, tmp_path):
    expected, expected_report = compress(name, accelerator_on("pretend"))
    found, report = compress_interrupted(name, accelerator_on("pretend"), tmp_path / "state")
    assert not list(tmp_path.iterdir())
    assert report.loss == expected_report.loss
    for key, weight in weights(expected).items():
        assert torch.equal(weights(found)[key], weight), key


# Its Fisher sums are 12 MB, the largest of a target 2.5 MB, and everything else is small beside them.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
ROOM = 10 * 10**6


def prune_wide(resources: Resources | None = None, capacity: int | None = None):
    """Prune on the accelerator, which has `capacity` bytes beside the model; also returns the peak of the rest."""
    model = build("ViT", **WIDE)
    config = CAPConfig(num_grads=8, fisher_block_size="row")
    compressor = CAPCompressor(model, config, accelerator_on("pretend"), disable_tqdm=True, resources=resources)
    model.to("pretend")
    gc.collect()
    before = torch.pretend.memory_allocated()
    torch.pretend.reset_peak_memory_stats()
    with pretend.capacity(torch.pretend.mem_get_info()[0] if capacity is None else capacity):
        report = compressor.collect(loader(model, 8)).prune(0.6)
    return compressor, report, torch.pretend.max_memory_allocated() - before


def test_the_plan_goes_by_the_memory_of_the_accelerator():
    compressor, _, _ = prune_wide(capacity=256 * 10**6)
    assert 100 * 10**6 < compressor.plan.available <= 256 * 10**6


@pytest.mark.parametrize("limit", ["capacity", "max_memory"])
def test_several_passes_stay_within_the_memory_of_the_accelerator(limit, tmp_path):
    expected, report, _ = prune_wide()
    assert len(expected.plan.passes) == 1
    if limit == "capacity":
        compressor, found, peak = prune_wide(Resources(spill_dir=str(tmp_path)), ROOM)
    else:
        gc.collect()
        used = torch.pretend.memory_allocated() + sum(each.nbytes for each in build("ViT", **WIDE).parameters())
        compressor, found, peak = prune_wide(Resources(f"{used + ROOM}", spill_dir=str(tmp_path)))
    assert len(compressor.plan.passes) > 1
    assert peak <= ROOM
    assert_same((compressor, found), (expected, report))


def count(rows: int) -> tuple[pretend.Launches, pretend.Launches]:
    """What the accelerator is asked for by the collection and by the pruning of a layer with so many blocks of 64."""
    model = build("ViT", hidden_size=64, intermediate_size=rows, num_hidden_layers=1)
    config = CAPConfig(num_grads=4, include=["*mlp.fc1"])
    compressor = CAPCompressor(model, config, accelerator_on("pretend"), disable_tqdm=True)
    batches = random_batches(model, 8, sizes=(4,))
    with pretend.count_launches() as collecting:
        compressor.collect(batches)
    with pretend.count_launches() as pruning:
        compressor.prune(0.6)
    return collecting, pruning


def test_launches_do_not_grow_with_the_number_of_blocks():
    few, many = count(128), count(2048)
    for small, large in zip(few, many, strict=True):
        assert sum(large.launches.values()) < 1.5 * sum(small.launches.values())
        assert sum(large.transfers.values()) < 1.5 * sum(small.transfers.values())
    # 64 steps of an elimination, none of which waits for the accelerator.
    assert sum(few[1].launches.values()) < 40 * 64
    assert few[1].transfers["aten::_local_scalar_dense"] < 64


def test_a_panel_has_few_launches_beside_its_steps():
    """So a GPU, on which one kernel does the steps, has few launches in all, however many weights a block has."""
    inside, totals = 0, []

    def remove(panel: panels.Panel) -> None:
        nonlocal inside
        before = sum(torch.ops.pretend.launches().values())
        panels.remove_in_torch(panel)
        inside += sum(torch.ops.pretend.launches().values()) - before

    for size in (panels.PANEL, 4 * panels.PANEL):
        weights, fisher = (each.float().to("pretend") for each in make_blocks(0, 5, size))
        inverse, inside = invert(fisher), 0
        with pretend.count_launches() as counts:
            panels.eliminate_in_torch(weights, inverse, None, remove)
        totals.append(sum(counts.launches.values()) - inside + size // panels.PANEL)
    # As plans on paper have it (cap_hf/collection/clock.py).
    assert totals[0] < LAUNCHES
    assert totals[1] < 4 * LAUNCHES


def test_evaluation_gives_what_it_gives_on_the_cpu():
    results = []
    for device in ("cpu", "pretend"):
        accelerator = accelerator_on(device)
        model = build("ViT")
        results.append(evaluate_model(model, accelerator.prepare(loader(model, 8)), accelerator, disable_tqdm=True))
        assert model.device.type == device
    assert results[0] == pytest.approx(results[1])


@pytest.mark.parametrize("compressed", [False, True])
def test_saved_from_the_accelerator_and_loaded_again(compressed, tmp_path):
    compressor, _ = compress("cap", accelerator_on("pretend"))
    compressor.save_pretrained(tmp_path / "sparse", compressed=compressed)
    for placed in ({}, {"device_map": "pretend"}):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "sparse", **placed)
        assert model.device.type == placed.get("device_map", "cpu")
        for name, tensor in compressor.model.state_dict().items():
            assert torch.equal(model.state_dict()[name].cpu(), tensor.cpu()), name


def test_the_peak_of_the_accelerator_is_reported():
    reset_peak_memory()
    tensor = torch.zeros(10**6, device="pretend")
    peaks = peak_memory()
    assert peaks.keys() == {"cpu", "pretend"}
    assert tensor.nbytes <= peaks["pretend"] <= torch.pretend.mem_get_info()[1]
