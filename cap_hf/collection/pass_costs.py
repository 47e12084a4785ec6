"""What a pass takes of one gradient sample, by how much of the model it goes through."""

from itertools import takewhile

from cap_hf.collection.costs import Costs
from cap_hf.collection.plan import Plan
from cap_hf.collection.stretches import Stretch, stretch_of


def pass_seconds(
    plan: Plan, number: int, costs: Costs, inputs: bool, gradients: bool = True, keeping: bool = False
) -> float:
    """Return the seconds of one gradient sample in a pass: through the model, and summed.

    Args:
        plan: of the passes.
        number: of the pass.
        costs: of a gradient sample that goes through the whole model, forward and backward.
        inputs: whether inputs are summed.
        gradients: whether gradients are.
        keeping: whether the pass keeps what the others need, if any does: then it goes through all of the model.
    """
    through = costs.seconds * share_of_model(plan, number, costs, keeping)
    return through + costs.summing_seconds(plan.passes[number], inputs, gradients)


def share_of_model(plan: Plan, number: int, costs: Costs, keeping: bool) -> float:
    """Return what part of a forward and backward pass through the whole model a pass takes; arguments are as above."""
    total = sum(costs.work.values())
    if not total:
        return 1.0
    stretch = alone(plan, number, costs, keeping)
    if stretch is not None:
        inside = {module for layer in stretch.layers for module in layer.modules()}
        return sum(work for module, work in costs.work.items() if module in inside) / total
    # Forward through all of it, and backward no further than the first of the pass.
    first = min(plan.passes[number], key=lambda target: target.index).module
    below = sum(costs.work[module] for module in takewhile(lambda module: module is not first, costs.work))
    return 0.5 + 0.5 * (1 - below / total)


def alone(plan: Plan, number: int, costs: Costs, keeping: bool) -> Stretch | None:
    """Return the layers that a pass goes through alone, None where it goes through all; arguments are as above."""
    return stretch_of(costs.chains, plan.passes[number], plan.keeps) if plan.keeps and not keeping else None


def passes_again(plan: Plan) -> list[tuple[int, bool]]:
    """Return the numbers of the passes that are gone through again, for new weights; and whether each keeps states."""
    if not plan.recollects:
        return []
    last = len(plan.passes) - 1
    # The first time begins with the pass that the paths have ended with, whose sums are still there; after each time
    # sums and states are gone.
    return [(number, time > 0 and number == last) for time in range(plan.rounds) for number in range(last + (time > 0))]


def passes_through(plan: Plan, costs: Costs) -> int:
    """Return how often the examples go through the model, for paths and for new weights."""
    ways = [(number, number == 0) for number in range(len(plan.passes))] + passes_again(plan)
    return sum(alone(plan, number, costs, keeping) is None for number, keeping in ways)
