"""What is foreseen of a job."""

from dataclasses import replace

import pytest
import torch
from support.models import build

from cap_hf.collection import forecast, input_sums
from cap_hf.collection.costs import Costs
from cap_hf.collection.forecast import Alike, Forecast, Measured, foresee, refit_seconds, trial_seconds
from cap_hf.collection.plan import Plan
from cap_hf.collection.progress import Foreseen
from cap_hf.collection.resources import Afterwards
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
    # On the disk there is room for the new weights of all three, which are read for once.
    slow = foresee(plan, costs, config, Processes(), tmp_path, 3)
    assert all(after.seconds > before.seconds for after, before in zip(slow, found, strict=True))
    alone = foresee(plan, costs, config, Processes(), tmp_path, 1)[-1]
    assert [each.kind for each in slow] == ["collecting"] * 2 + ["eliminating"] + ["reconstructing"] * 3
    assert alone.seconds < sum(each.seconds for each in slow[3:]) < 1.1 * alone.seconds


def test_blocks_too_large_to_try_take_as_much_longer_as_their_size_cubed(monkeypatch):
    monkeypatch.setattr(forecast, "TRIAL_SIZE", 16)
    times = iter(float(number) for number in range(100))
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(times))
    tried = trial_seconds(CAPConfig(), 16, torch.device("cpu"))
    larger = trial_seconds(CAPConfig(), 32, torch.device("cpu"))
    assert larger == tuple(8 * each for each in tried)


@pytest.mark.parametrize("changes", [{}, {"method": "obs"}, {"allocation": "2:4"}, {"weight_update": "independent"}])
def test_what_is_tried_is_what_the_config_asks_for(changes):
    eliminated, solved, more = trial_seconds(CAPConfig(**changes), 24, torch.device("cpu"))
    assert eliminated > 0
    assert solved > 0
    assert more >= 0


class Given(dict):
    """Trials that are known beforehand."""

    def __missing__(self, size: int) -> tuple[float, float, float]:
        return 1.0, 0.1, 0.01


def test_the_seconds_of_a_refit_are_those_of_its_parts():
    """One trial of 1 s for an elimination and 0.1 s for new weights: by hand, for rows of 16 and of 32.

    Positions are weighed once for all refits, and half of a symmetric matrix is made.
    """
    targets = [target for target in find_targets(build("ViT")) if target.name.endswith(("fc1", "fc2"))][:2]
    assert {target.row_size for target in targets} == {16, 32}
    rows = sum(len(target.weight) for target in targets)
    costs = Costs(4, seconds=2.0, multiplications=10.0, positions={targets[0].name: 3, targets[1].name: 2})
    config = CAPConfig(refit_examples=8)
    # fc1 is 32 x 16 and fc2 16 x 32: of one position's 512 products each, moments are 16 x 40 and 32 x 32.
    moments = (3 * 16 * 40 + 2 * 32 * 32) / ((3 + 2) * 512)
    expected = 8 * (2.0 + (2 + moments) * 0.5) + 0.1 * rows
    assert refit_seconds(targets, costs, 0.5, config, Processes(), Given()) == pytest.approx(expected)
    several = 8 * (2.0 + 3 * (2 + moments) * 0.5) + 3 * 0.1 * rows
    assert refit_seconds(targets, costs, 0.5, config, Processes(), Given(), 3) == pytest.approx(several)
    four = Alike(4, torch.device("cpu"))
    assert refit_seconds(targets, costs, 0.5, config, four, Given()) == pytest.approx(expected / 4)
    # SparseGPT's refit chooses what goes, too.
    sequential = replace(config, method="sparsegpt")
    assert refit_seconds(targets, costs, 0.5, sequential, Processes(), Given()) == pytest.approx(expected + rows)


@pytest.mark.parametrize("recollects", [False, True])
def test_sparsities_that_are_solved_for_together_share_what_they_can(recollects):
    """1 s to eliminate a block, 0.1 s for new weights of one sparsity, 0.01 s for each one more: by hand."""
    targets = find_targets(build("ViT"))
    plan = Plan([targets[:2], targets[2:]], "row", 8, 8, available=10**9, recollects=recollects)
    blocks = sum(len(target.weight) * target.row_size // target.block_size for target in targets)
    for prunes, each in ((1, 0.1), (5, 0.14)):
        found = foresee(plan, Costs(8, multiplications=1e6), CAPConfig(), Processes(), None, prunes, Given())
        solved = sum(phase.seconds for phase in found if phase.kind == "reconstructing")
        assert solved == pytest.approx(blocks * each)


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
    # A search refits each model that it tries.
    config = CAPConfig(num_grads=6, refit_examples=5)
    measured = Measured(config, Afterwards(2, True, 4), Costs(8), Costs(1, seconds=3.0), 0.0, Given(), Given())
    found = measured.forecast(plan, [], Alike(3, cpu), None)
    assert found.images == {"collecting": 6, "refitting": 2 * 4 * 5}
    assert found.seconds["refitting"] == 5 * 3.0 / 3
