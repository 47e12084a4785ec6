"""What is foreseen of a job."""

import gc
import weakref
from dataclasses import replace

import psutil
import pytest
import torch
from support.backbones import tiny_dinov2
from support.models import build, random_batches

from cap_hf import CAPCompressor
from cap_hf.collection import forecast, input_sums
from cap_hf.collection.costs import Costs
from cap_hf.collection.forecast import Alike, Forecast, Measured, foresee, refit_seconds, trial_seconds
from cap_hf.collection.plan import Plan
from cap_hf.collection.progress import Foreseen
from cap_hf.collection.resources import Afterwards, Resources
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.targets import find_targets


def test_every_phase_is_foreseen_and_larger_groups_take_longer(monkeypatch, tmp_path):
    targets = find_targets(build("ViT"))
    plan = Plan([targets[:2], targets[2:]], "row", 8, 8, spilled=1)
    costs = Costs(8, seconds=0.0, multiplications=1e6)
    config = CAPConfig(num_grads=100)
    found = foresee(plan, costs, config, Processes(), None, 3)
    assert [each.kind for each in found] == ["collecting"] * 2 + ["eliminating"] + ["reconstructing"] * 3
    assert found[1].seconds > found[0].seconds > 0
    assert found[0].seconds == pytest.approx(costs.summing_seconds(targets[:2]) * 100)
    # The inputs' products come on top, of as many positions as a sample has.
    costs.positions = {target.name: 50 for target in targets}
    longer = foresee(plan, costs, config, Processes(), None, 3)
    assert longer[0].seconds > found[0].seconds
    assert foresee(plan, costs, replace(config, fisher_prior="identity"), Processes(), None, 3)[0] == found[0]
    costs.positions = {}
    monkeypatch.setattr(forecast, "disk_seconds", lambda folder: 1.0)
    slow = foresee(plan, costs, config, Processes(), tmp_path, 3)
    assert all(after.seconds > before.seconds for after, before in zip(slow, found, strict=True))


def test_blocks_too_large_to_try_take_as_much_longer_as_their_size_cubed(monkeypatch):
    monkeypatch.setattr(forecast, "TRIAL_SIZE", 16)
    times = iter(float(number) for number in range(100))
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(times))
    tried = trial_seconds(CAPConfig(), 16, torch.device("cpu"))
    larger = trial_seconds(CAPConfig(), 32, torch.device("cpu"))
    assert larger == tuple(8 * each for each in tried)


@pytest.mark.parametrize("changes", [{}, {"method": "obs"}, {"allocation": "2:4"}, {"weight_update": "independent"}])
def test_what_is_tried_is_what_the_config_asks_for(changes):
    assert all(seconds > 0 for seconds in trial_seconds(CAPConfig(**changes), 24, torch.device("cpu")))


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


class Given(dict):
    """Trials that are known beforehand."""

    def __missing__(self, size: int) -> tuple[float, float]:
        return 1.0, 0.1


def test_the_seconds_of_a_refit_are_those_of_its_parts():
    """One trial of 1 s for an elimination and 0.1 s for new weights: by hand, for rows of 16 and of 32."""
    targets = [target for target in find_targets(build("ViT")) if target.name.endswith(("fc1", "fc2"))][:2]
    assert {target.row_size for target in targets} == {16, 32}
    rows = sum(len(target.weight) for target in targets)
    costs = Costs(4, seconds=2.0, multiplications=10.0, positions={targets[0].name: 3, targets[1].name: 2})
    config = CAPConfig(refit_examples=8)
    # fc1 is 32 x 16 and fc2 16 x 32: of one position's 512 products each, moments are 16 x 48 and 32 x 48.
    moments = (3 * 16 * 48 + 2 * 32 * 48) / ((3 + 2) * 512)
    expected = 8 * (2.0 + (2 + moments) * 0.5) + 0.1 * rows
    assert refit_seconds(targets, costs, 0.5, config, Processes(), Given()) == pytest.approx(expected)
    four = Alike(4, torch.device("cpu"))
    assert refit_seconds(targets, costs, 0.5, config, four, Given()) == pytest.approx(expected / 4)
    # SparseGPT's refit chooses what goes, too.
    sequential = replace(config, method="sparsegpt")
    assert refit_seconds(targets, costs, 0.5, sequential, Processes(), Given()) == pytest.approx(expected + rows)


def test_blocks_are_tried_once_for_all_numbers_of_processes(monkeypatch):
    tried = []
    monkeypatch.setattr(forecast, "trial_seconds", lambda config, size, device: tried.append(size) or (1.0, 0.1))
    model = build("ViT")
    found = CAPCompressor(model, CAPConfig(num_grads=8)).forecast(random_batches(model, 8), (1, 1, 1))
    assert len(tried) == len(set(tried))
    assert found[0].seconds == found[1].seconds == found[2].seconds


def test_what_sums_inputs_is_not_foreseen_to_sum_gradients():
    targets = find_targets(build("ViT"))
    costs = Costs(8, multiplications=1e3, positions={target.name: 5 for target in targets})
    config = CAPConfig(method="wanda", num_grads=10)
    found = foresee(Plan([targets], "row", 8, 8), costs, config, Processes(), None, 1, Given())
    expected = sum(input_sums.products(target, 5) for target in targets)
    assert found[0].seconds == pytest.approx(10 * expected / 1e3)


def test_a_forecast_adds_up_what_is_foreseen_of_each_kind(monkeypatch):
    phases = [Foreseen("collecting", 1.0), Foreseen("eliminating", 2.0), Foreseen("collecting", 4.0)]
    monkeypatch.setattr(forecast, "foresee", lambda *args: phases)
    plan, cpu = Plan([find_targets(build("ViT"))], "row", 8, 8), torch.device("cpu")
    measured = Measured(CAPConfig(num_grads=6), Afterwards(2), Costs(8), None, 0.0, Given(), Given())
    found = measured.forecast(plan, [], Alike(3, cpu), None)
    assert found == Forecast(3, plan, {"collecting": 5.0, "eliminating": 2.0}, {"collecting": 6})
