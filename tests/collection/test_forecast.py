"""What is foreseen of a job."""

from dataclasses import replace

import pytest
import torch
from support.models import build, random_batches

from cap_hf import CAPCompressor
from cap_hf.collection import forecast
from cap_hf.collection.costs import Costs
from cap_hf.collection.forecast import Alike, Forecast, foresee, refit_seconds, trial_seconds
from cap_hf.collection.plan import Plan
from cap_hf.collection.progress import Foreseen
from cap_hf.collection.resources import Afterwards, Resources
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
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
    compressor = CAPCompressor(model, config, resources=Resources(max_memory="1KB"))
    (found,) = compressor.forecast(random_batches(model, 8), (1,))
    assert found.plan is None
    assert "does not fit" in found.problem
    assert not found.seconds


def test_without_a_statistic_there_is_nothing_to_plan():
    found = CAPCompressor(build("ViT"), CAPConfig(method="magnitude")).forecast([], (1, 2))
    assert [(each.processes, each.plan, dict(each.seconds), each.problem) for each in found] == [
        (1, None, {}, ""),
        (2, None, {}, ""),
    ]


def test_the_seconds_of_a_refit_are_those_of_its_parts(monkeypatch):
    """One trial of 1 s for an elimination and 0.1 s for new weights: by hand, for two rows of two sizes."""
    monkeypatch.setattr(forecast, "trial_seconds", lambda config, size, device: (1.0, 0.1))
    targets = find_targets(build("ViT"))[:2]
    rows = sum(len(target.weight) for target in targets)
    costs = Costs(4, seconds=2.0, multiplications=10.0, positions={targets[0].name: 6, targets[1].name: 4})
    config = CAPConfig(refit_examples=8, samples_per_grad=2)
    squares = [target.row_size * (target.row_size + len(target.weight)) for target in targets]
    expected = 8 * (2.0 / 2 + 2 * 0.5 + (3 * squares[0] + 2 * squares[1]) / 10) + 0.1 * rows
    assert refit_seconds(targets, costs, 0.5, config, Processes()) == pytest.approx(expected)
    assert refit_seconds(targets, costs, 0.5, config, Alike(4, torch.device("cpu"))) == pytest.approx(expected / 4)
    # SparseGPT's refit chooses what goes, too.
    sequential = replace(config, method="sparsegpt")
    assert refit_seconds(targets, costs, 0.5, sequential, Processes()) == pytest.approx(expected + rows)


def test_a_forecast_adds_up_what_is_foreseen_of_each_kind(monkeypatch):
    phases = [Foreseen("collecting", 1.0), Foreseen("eliminating", 2.0), Foreseen("collecting", 4.0)]
    monkeypatch.setattr(forecast, "foresee", lambda *args: phases)
    plan = Plan([find_targets(build("ViT"))], "row", 8, 8)
    found = forecast.forecast(plan, Costs(8), 0.0, CAPConfig(), Alike(3, torch.device("cpu")), None, Afterwards(2))
    assert found == Forecast(3, plan, {"collecting": 5.0, "eliminating": 2.0})
