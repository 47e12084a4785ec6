"""What a pass takes, by how much of the model it goes through."""

import pytest
from support.models import build

from cap_hf.collection.costs import Costs
from cap_hf.collection.pass_costs import alone, pass_seconds, passes_again, passes_through, share_of_model
from cap_hf.collection.plan import Plan
from cap_hf.collection.stretches import Chain
from cap_hf.targets import find_targets


def layers(keeps: int) -> tuple[Plan, Costs]:
    """A plan of a pass for each of four layers, which all have the same weights."""
    model = build("ViT", num_hidden_layers=4)
    targets = find_targets(model)
    groups = [[each for each in targets if f".{number}." in each.name] for number in range(4)]
    names = tuple(frozenset(each.name for each in group) for group in groups)
    costs = Costs(seconds=8.0, multiplications=1e30)
    costs.work = {each.module: 5 * each.weight.numel() for each in targets}
    costs.chains = [Chain(tuple(model.vit.layers), names, (1,) * 5)]
    return Plan(groups, "row", 4, 4, recollects=True, keeps=keeps), costs


def test_a_pass_goes_back_no_further_than_its_targets():
    plan, costs = layers(keeps=0)
    shares = [share_of_model(plan, number, costs, keeping=True) for number in range(4)]
    assert shares == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8])
    assert shares == [share_of_model(plan, number, costs, keeping=False) for number in range(4)]
    assert passes_through(plan, costs) == plan.num_passes == 7


def test_with_states_only_the_first_goes_through_the_model():
    plan, costs = layers(keeps=1)
    assert [share_of_model(plan, number, costs, keeping=number == 0) for number in range(4)] == [1, 1 / 4, 1 / 4, 1 / 4]
    assert share_of_model(plan, 0, costs, keeping=False) == 1 / 4
    assert alone(plan, 0, costs, keeping=True) is None
    assert passes_through(plan, costs) == 1
    assert pass_seconds(plan, 1, costs, inputs=True) == pytest.approx(2.0)


def test_each_further_round_goes_through_all_passes_again():
    plan, costs = layers(keeps=0)
    plan.rounds = 3
    assert [number for number, _ in passes_again(plan)] == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    assert plan.num_passes == passes_through(plan, costs) == 4 + 11
    # After each time states are gone: the first pass of the next one keeps them anew.
    plan.keeps = 1
    assert [number for number, keeping in passes_again(plan) if keeping] == [3, 3]
    assert passes_through(plan, costs) == 3
    plan.recollects = False
    assert passes_again(plan) == []
    assert plan.num_passes == 4


def test_what_lies_in_no_chain_goes_through_the_model_every_time():
    plan, costs = layers(keeps=1)
    costs.chains = [Chain(each.layers[:2], each.targets[:2], each.sizes[:3]) for each in costs.chains]
    assert [share_of_model(plan, number, costs, keeping=number == 0) for number in range(4)] == [1, 1 / 4, 6 / 8, 5 / 8]
    # The first, those of the upper layers, and one of these once more.
    assert passes_through(plan, costs) == 1 + 2 + 1


def test_work_counts_weights_and_how_often_they_are_seen():
    plan, costs = layers(keeps=1)
    for target in plan.passes[3]:
        costs.work[target.module] *= 3
    assert share_of_model(plan, 3, costs, keeping=False) == pytest.approx(3 / 6)


def test_layers_that_are_not_pruned_are_gone_through_all_the_same():
    """With `--include` of some layers, a pass through one of them was taken for one through half of the model."""
    plan, costs = layers(keeps=0)
    plan.passes = plan.passes[1:3]
    assert [share_of_model(plan, number, costs, keeping=True) for number in range(2)] == [7 / 8, 6 / 8]
    plan.keeps = 1
    assert [share_of_model(plan, number, costs, keeping=False) for number in range(2)] == [1 / 4, 1 / 4]
    assert share_of_model(plan, 0, Costs(), keeping=True) == 1


def test_with_fewer_states_passes_go_through_more_layers():
    plan, costs = layers(keeps=2)
    assert [share_of_model(plan, number, costs, keeping=False) for number in range(4)] == [1 / 2] * 4
    plan.keeps = 3
    assert [share_of_model(plan, number, costs, keeping=False) for number in range(4)] == [3 / 4] * 3 + [1 / 4]
