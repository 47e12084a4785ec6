"""`--budget` of `cap-hf prune`: in the place of a sparsity, and beside it in the table."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cap_hf.budget import Budget, parse_budgets
from cap_hf.commands.prune_arguments import PruneArguments, check_sparsities
from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError

if TYPE_CHECKING:
    from cap_hf.data.images import ImageDataset


def check_amounts(args: PruneArguments, config: CAPConfig) -> list[float | Budget]:
    """Return the sparsities, or the budgets, that are pruned to one after the other: what keeps most comes first.

    Raises:
        CAPError: both are given, or neither; one is no budget; or something else says how much is kept.
    """
    if args.budget is None:
        return list(check_sparsities(args.sparsity, config))
    budgets = parse_budgets(args.budget)
    if args.sparsity:
        raise CAPError("--budget takes the place of --sparsity: leave one of them out")
    if args.num_recomputations:
        raise CAPError("--budget has no sparsities on the way to it: leave out --num_recomputations")
    for budget in budgets:
        budget.check(config.allocation, config.selection)
    return list(budgets)


def ways_to(amounts: Sequence[float | Budget], recomputations: int, start: float) -> list[list[float]]:
    """Return for each sparsity those on the way to it, and itself; nothing for a budget.

    Args:
        amounts: that are pruned to.
        recomputations: as of `PruneArguments`.
        start: sparsity of the model.
    """
    from cap_hf.stepwise import steps_towards

    return [[] if isinstance(each, Budget) else steps_towards(each, recomputations, start) for each in amounts]


def with_example(amounts: Sequence[float | Budget], images: "ImageDataset") -> list[float | Budget]:
    """Return the same with the first image for the budgets' example; it is read only where there is a budget."""
    from cap_hf.data.images import collate

    if not any(isinstance(each, Budget) for each in amounts):
        return list(amounts)
    inputs = {name: value for name, value in collate([images[0]]).items() if name != "labels"}
    return [replace(each, example_inputs=inputs) if isinstance(each, Budget) else each for each in amounts]


def budget_columns(prunings: Sequence[Mapping[str, Any] | None]) -> dict[str, list[float | None]]:
    """Return by heading the shares that a table shows of the models of some reports of a pruning, None of the dense."""
    budgets = [(pruning or {}).get("budget") for pruning in prunings]
    kind = next((budget["kind"] for budget in budgets if budget), None)
    if kind is None:
        return {}
    shares = {"asked %": "requested", f"{kind} %": "achieved"}
    if kind.startswith("latency"):
        shares = {"asked %": "requested", "predicted %": "predicted", f"{kind} %": "achieved", "±": "error"}
    return {heading: [budget[key] if budget else None for budget in budgets] for heading, key in shares.items()}
