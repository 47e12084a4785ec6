"""What a collection and all that follows would take, on this machine and on paper."""

import gc
import weakref
from dataclasses import replace

import psutil
import pytest
import torch
from support.backbones import tiny_dinov2
from support.models import build, random_batches

from cap_hf import CAPCompressor
from cap_hf.collection import clock
from cap_hf.collection.forecast import Alike, Forecast
from cap_hf.collection.hardware import GPUS
from cap_hf.collection.plan import plan_passes
from cap_hf.collection.resources import Resources
from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError
from cap_hf.method.losses import LabelLoss
from cap_hf.targets import find_targets


def test_a_forecast_has_the_plan_that_a_collection_takes_and_collects_nothing():
    model = build("ViT")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, resources = CAPConfig(num_grads=16, fisher_block_size="row"), Resources(max_memory="4GB")
    batches = random_batches(model, 8)
    compressor = CAPCompressor(model, config, resources=resources, prunes=3, refits=True)
    one, two, four = compressor.forecast(batches, (1, 2, 4))
    assert compressor.plan is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plan = compressor.collect(batches).plan
    assert one.plan.to_dict() == plan.to_dict()
    assert one.plan.sums == plan.sums
    # The weights of both are shared out evenly.
    assert one.plan.sums > 1.5 * two.plan.sums > 2 * four.plan.sums
    assert [each.processes for each in (one, two, four)] == [1, 2, 4]
    assert list(one.seconds) == ["collecting", "eliminating", "reconstructing", "refitting"]
    assert all(seconds > 0 for seconds in one.seconds.values())
    assert two.seconds["collecting"] < one.seconds["collecting"]


def test_a_forecast_says_where_nothing_fits_and_where_more_processes_do():
    model = build("ViT")
    config = CAPConfig(num_grads=16, fisher_block_size="row")

    def found(memory: int) -> list[Forecast]:
        compressor = CAPCompressor(model, config)
        # What a process has in use already is not to count here.
        compressor.resources = Resources(max_memory=f"{psutil.Process().memory_info().rss + memory}", spill_dir="none")
        return compressor.forecast(random_batches(model, 8), (1, 64))

    one, many = found(10**3)
    assert one.plan is many.plan is None
    assert "does not fit" in one.problem
    assert not one.seconds
    needed = [each.plan.needed for each in found(10**9)]
    assert needed[1] < needed[0]


def test_without_a_statistic_there_is_a_refit_alone():
    batches = random_batches(build("ViT"), 8)
    config = CAPConfig(method="magnitude", refit_examples=8)
    for refits, expected in ((False, {}), (True, {"refitting": 16})):
        (found,) = CAPCompressor(build("ViT"), config, prunes=2, refits=refits).forecast(batches, (2,))
        assert (found.plan, dict(found.images), found.problem) == (None, expected, "")
        assert [*found.seconds] == [*expected]


def test_features_are_gone_through_once_more_for_their_deviations():
    model = tiny_dinov2()
    batches = [{"pixel_values": torch.randn(4, 3, 8, 8)} for _ in range(3)]
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(1))
    (found,) = CAPCompressor(model, CAPConfig(num_grads=12, feature_projections=2)).forecast(batches, (1,))
    assert found.images == {"collecting": 2 * 6}
    # The first batch alone: for its deviations, its costs and its time, some of them measured twice.
    assert len(seen) < 12


def test_a_forecast_takes_no_example_from_a_collection():
    model = build("ViT")
    config = CAPConfig(num_grads=8)
    batches = random_batches(model, 8)
    once = iter(batches)
    with pytest.raises(CAPError, match="a forecast leaves the examples"):
        CAPCompressor(model, config).forecast(once)
    assert len([*once]) == len(batches)
    with pytest.raises(CAPError, match="the dataloader is empty"):
        CAPCompressor(model, config).forecast([])
    for wrong in ((0,), (-1,), (1.5,)):
        with pytest.raises(CAPError, match="pass whole numbers of at least 1"):
            CAPCompressor(model, config).forecast(random_batches(model, 8), wrong)
    with pytest.raises(CAPError, match="processes=2 is of type int"):
        CAPCompressor(model, config).forecast(random_batches(model, 8), 2)


def test_a_forecast_leaves_no_folder(tmp_path):
    folder, model = tmp_path / "a" / "b", build("ViT")
    rss = psutil.Process().memory_info().rss
    config = CAPConfig(num_grads=8, fisher_block_size="row")
    needed = CAPCompressor(model, config).forecast(random_batches(model, 8), (1,))[0].plan.needed
    resources = Resources(max_memory=f"{rss + needed * 9 // 10}", spill_dir=str(folder))
    CAPCompressor(model, config, resources=resources).forecast(random_batches(model, 8), (1,))
    assert list(tmp_path.iterdir()) == []


def test_a_collection_lets_go_of_its_examples():
    class Kept(list):
        pass

    model = build("ViT")
    batches = Kept(random_batches(model, 8))
    gone = weakref.ref(batches)
    compressor = CAPCompressor(model, CAPConfig(num_grads=8)).collect(batches)
    del batches
    gc.collect()
    assert gone() is None
    assert compressor.fisher is not None


def test_blocks_are_tried_once_for_all_numbers_of_processes(monkeypatch):
    tried = []
    monkeypatch.setattr(clock, "trial_seconds", lambda config, size, device: tried.append(size) or (1.0, 0.1, 0.01))
    model = build("ViT")
    found = CAPCompressor(model, CAPConfig(num_grads=8)).forecast(random_batches(model, 8), (1, 1, 1))
    assert len(tried) == len(set(tried))
    assert found[0].seconds == found[1].seconds == found[2].seconds


def test_on_paper_a_gpu_with_twice_of_everything_takes_half_the_time():
    model = build("ViT")
    batches = random_batches(model, 8)
    config = CAPConfig(num_grads=16, fisher_block_size="row")
    compressor = CAPCompressor(model, config, prunes=2, refits=True)
    gpu = GPUS["H100"]
    twice = replace(gpu, float32=2 * gpu.float32, float64=2 * gpu.float64, bandwidth=2 * gpu.bandwidth)
    (one,), (half,) = (compressor.forecast(batches, (8,), each) for each in (gpu, twice))
    assert [*one.seconds] == ["collecting", "eliminating", "reconstructing", "refitting"]
    for kind, seconds in one.seconds.items():
        if kind == "eliminating":  # launches take as long as before
            assert seconds / 2 < half.seconds[kind] <= seconds
        else:
            assert half.seconds[kind] == pytest.approx(seconds / 2)
    assert one.plan.to_dict() == half.plan.to_dict()
    assert one.processes == 8


def test_on_paper_the_memory_is_that_of_the_gpu_and_nothing_goes_to_a_disk(tmp_path):
    model = build("ViT")
    config, spill = CAPConfig(num_grads=16, fisher_block_size="row"), Resources(spill_dir=str(tmp_path / "spill"))
    compressor = CAPCompressor(model, config, resources=spill)
    batches = random_batches(model, 8)
    (whole,) = compressor.forecast(batches, (1,), GPUS["H100"])
    assert whole.plan.num_passes == 1
    size = sum(each.nbytes for each in model.parameters())
    assert whole.plan.available == int((80e9 - clock.CONTEXT - size) * clock.HEAD_ROOM)
    # With less and less memory, the sums of all layers no longer fit, and are never foreseen to go to a disk.
    plans = []
    for share in (1.0, 0.8, 0.6, 0.4):
        memory = share * whole.plan.sums / clock.HEAD_ROOM + clock.CONTEXT + size
        (small,) = compressor.forecast(batches, (1,), replace(GPUS["H100"], memory=memory))
        plans += [small.plan] if small.plan else []
    assert any(plan.recollects for plan in plans)
    assert not any(plan.spilled for plan in plans)
    (none,) = compressor.forecast(batches, (1,), replace(GPUS["H100"], memory=1e9))
    assert none.problem.endswith("leaves nothing of the memory that there is: plan for a larger GPU")
    # The plan is that of weights on a device, whatever they are on here.
    costs = compressor._collection(batches).measure(LabelLoss())
    alike = Alike(8, torch.device("cuda"))
    plans = []
    for kind in ("cpu", "meta"):
        found = build("ViT").to(kind)
        plans.append(plan_passes(find_targets(found, "row"), "row", 10**9, costs, alike))
    assert plans[0].needed == plans[1].needed
    assert not (tmp_path / "spill").exists()
    # What a process may take is less than what there is.
    compressor.resources = Resources(max_memory="1GB")
    assert compressor.forecast(batches, (1,), GPUS["H100"])[0].plan.available == 10**9 - size


def test_on_paper_only_a_gpu_and_cap_are_known():
    model = build("ViT")
    with pytest.raises(CAPError, match="hardware='H100' is of type str"):
        CAPCompressor(model, CAPConfig(num_grads=8)).forecast(random_batches(model, 8), (1,), "H100")
    with pytest.raises(CAPError, match="method=wanda: a plan on paper is for cap alone"):
        CAPCompressor(model, CAPConfig(method="wanda")).forecast(random_batches(model, 8), (1,), GPUS["H100"])
