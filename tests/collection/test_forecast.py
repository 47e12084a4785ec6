"""What is foreseen of a job."""

from dataclasses import replace

import pytest
import torch
from support.models import build

from cap_hf.collection import forecast
from cap_hf.collection.costs import Costs
from cap_hf.collection.forecast import foresee, trial_seconds
from cap_hf.collection.plan import Plan
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
