"""What budgets are counted in: multiply-adds, bytes and seconds of a model, by target; spent, checked and reported."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from cap_hf.budget import KINDS, Budget, CostCurve
from cap_hf.checkpoints.sizes import compressed_points, measure_model, saved_tensors
from cap_hf.collection.progress import Progress
from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.inference.example import Inputs, make_example
from cap_hf.inference.latency import latency_points, measure_random, measure_share
from cap_hf.inference.positions import count_positions
from cap_hf.masks import zero_units
from cap_hf.method.allocation import allocate
from cap_hf.method.spending import spend
from cap_hf.patterns import unit_of
from cap_hf.report import BudgetReport
from cap_hf.targets import Target

# What costs are counted in.
COUNTED_IN = {"flops": "multiply-adds", "bytes": "bytes", "latency": "seconds", "latency-int8": "seconds"}
# How often seconds are predicted anew by what is measured at an even sparsity; how sparse that is, and how exact.
CALIBRATIONS, LEAST_EVEN, MOST_EVEN, EVEN_STEP = 2, 0.02, 0.97, 1e-3
# A budget is met by a model that costs no more than this share beyond it: sums of seconds are rounded.
ROUNDING = 1e-9
# A unit costs what its weights would if none were 0. Of all weights this share may be zeros in units with others, such
# as rounding makes: by no more than that is the model then pruned beyond a budget.
MOST_STRAY = 0.01


@dataclass(frozen=True)
class Costs:
    """What a model costs in the measure of a budget.

    Attributes:
        curves: of each target, by removals of units.
        fixed: of all else, which no removal changes.
        dense: of the model with no zeros at all.
    """

    curves: list[CostCurve]
    fixed: float
    dense: float

    def of(self, removals: Sequence[int]) -> float:
        """Return what the model costs with so many units of each target removed."""
        return self.fixed + sum(curve.at(count) for curve, count in zip(self.curves, removals, strict=True))


class Budgets:
    """The costs of a model, each kind found once, at the first budget of it.

    Args:
        model: whose targets are pruned.
        processes: of the run; the first measures seconds for all.
        progress: told what goes on.
        dtype: that the model will be saved in; None for its own.
    """

    def __init__(
        self, model: nn.Module, processes: Processes, progress: Progress, dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.processes, self.progress, self.dtype = model, processes, progress, dtype
        # By kind and unit, and for latencies, which are measured near it, by share.
        self._costs: dict[tuple[str, int, float | None], Costs] = {}
        self._positions: dict[str, int] = {}
        self._example: Inputs | None = None

    def check(
        self,
        amount: float | Budget | None,
        config: CAPConfig,
        targets: Sequence[Target],
        zeros: Sequence[int] | None = None,
        entries: Sequence[int] | None = None,
    ) -> float | Budget:
        """Return how much to prune, as `CAPConfig.check_sparsity` of a sparsity: that of N:M where none is given.

        Args:
            amount: a sparsity, a budget or None.
            config: for the allocation, the selection and the pattern.
            targets: of the model.
            zeros: units of each that are 0 as a whole before it is pruned; None to count them.
            entries: weights of each that are 0 before it is pruned, alone or in such units; None to count them.

        Raises:
            CAPError: as of `CAPConfig.check_sparsity`; or the config does not go with a budget, nor do zeros that do
                not keep to its pattern; the model costs less already, or cannot cost so little; it fails on an image;
                or int8 cannot run here.
        """
        unit = unit_of(config.structure)
        zeros = zeros_of(targets, unit) if zeros is None else zeros
        if not isinstance(amount, Budget):
            total = sum(target.weight.numel() for target in targets)
            return config.check_sparsity(amount, total, unit * sum(zeros))
        budget = amount
        budget.check(config.allocation, config.selection)
        entries = zeros_of(targets, 1) if entries is None else entries
        stray = (sum(entries) - unit * sum(zeros)) / sum(counts_of(targets, 1))
        if stray > MOST_STRAY:
            raise CAPError(
                f"{budget} counts whole blocks of {config.structure}, and {stray:.1%} of the weights are zeros that "
                "lie in blocks with others: prune the dense model, or leave the pattern out"
            )
        costs = self.costs(budget, targets, unit)
        least, wanted = costs.of(counts_of(targets, unit)), budget.share * costs.dense
        if least > wanted:
            raise CAPError(
                f"{budget} cannot be met: with every target 0, {least / costs.dense:.1%} of {KINDS[budget.kind]} would "
                "be left"
            )
        # What a layer that stays dense takes is not known from those that do not.
        now = math.inf if budget.is_latency else self.costs(budget, targets, 1).of(entries)
        if now < wanted * (1 - ROUNDING):
            raise CAPError(
                f"the model takes {now / costs.dense:.4%} of {KINDS[budget.kind]} already: {budget} would be more"
            )
        return budget

    def spend(self, budget: Budget, config: CAPConfig, paths: RemovalPaths) -> list[torch.Tensor]:
        """Return how many units each of this process's blocks gives up for a budget, `(n,)` int64 for each target."""
        compared = paths.compared(config)
        costs = self.costs(budget, paths.targets, unit_of(config.structure))
        quotas = spend(compared, costs.curves, budget.share * costs.dense - costs.fixed, self.processes)
        return [counts for (counts,) in allocate([[path] for path in compared], quotas, self.processes)]

    def costs(self, budget: Budget, targets: Sequence[Target], unit: int) -> Costs:
        """Return what a model costs in the measure of a budget; its zeros make no difference.

        Args:
            budget: of some kind, perhaps with an example.
            targets: of the model.
            unit: weights that are removed together.
        """
        share = budget.share if budget.is_latency else None
        if (budget.kind, unit, share) not in self._costs:
            find = {"flops": self._flops, "bytes": self._bytes}.get(budget.kind, partial(self._seconds, budget))
            if budget.kind != "bytes":
                self._example = dict(budget.example_inputs or make_example(self.model))
            self._costs[budget.kind, unit, share] = find(targets, unit)
        return self._costs[budget.kind, unit, share]

    def report(self, budget: Budget, config: CAPConfig, targets: Sequence[Target]) -> BudgetReport:
        """Return what came out of a budget, of a model that has been pruned to it; of a latency it is also measured."""
        unit = unit_of(config.structure)
        costs, measured, threads = self.costs(budget, targets, unit), None, None
        if budget.kind == "flops":
            kept = float(sum(self._positions[each.name] * int(each.weight.count_nonzero()) for each in targets))
        elif budget.kind == "bytes":
            kept = float(measure_model(self.model, self.dtype)[1])
        else:
            kept = costs.of(zeros_of(targets, unit))
            threads, example = torch.get_num_threads(), self._example
            assert example is not None
            work = partial(measure_share, self.model, example, budget.kind.endswith("int8"))
            measured = on_first(self.processes, work)
        return BudgetReport(
            kind=budget.kind,
            requested=budget.share,
            achieved=kept / costs.dense,
            kept=kept,
            dense=costs.dense,
            counted_in=COUNTED_IN[budget.kind],
            measured=measured,
            threads=threads,
        )

    def _flops(self, targets: Sequence[Target], unit: int) -> Costs:
        assert self._example is not None
        self._positions = count_positions(self.model, targets, self._example)
        sizes = [(target.weight.numel(), self._positions[target.name]) for target in targets]
        curves = [CostCurve((0, size // unit), (float(size * each), 0.0)) for size, each in sizes]
        return Costs(curves, 0.0, float(sum(size * each for size, each in sizes)))

    def _bytes(self, targets: Sequence[Target], unit: int) -> Costs:
        saved = saved_tensors(self.model, self.dtype)
        by_place = {tensor.data_ptr(): (name, dtype) for name, tensor, dtype in saved}
        stored = [by_place[target.weight.data_ptr()] for target in targets]
        points = [
            compressed_points(target.weight.numel(), dtype.itemsize, unit)
            for target, (_, dtype) in zip(targets, stored, strict=True)
        ]
        rest, fixed = measure_model(self.model, self.dtype, {name for name, _ in stored})
        curves = [curve_of(each) for each in points]
        return Costs(curves, fixed, rest + sum(curve.costs[0] for curve in curves))

    def _seconds(self, budget: Budget, targets: Sequence[Target], unit: int) -> Costs:
        assert self._example is not None
        advance = self.progress.phase("measuring", "layer", len(targets) * (1 + CALIBRATIONS))
        how = (self.model, targets, self._example, budget.kind.endswith("int8"), unit)
        points, fixed, dense = on_first(self.processes, partial(latency_points, *how, advance))
        costs = Costs([curve_of(each) for each in points], fixed, dense)
        sizes = counts_of(targets, unit)
        for _ in range(CALIBRATIONS):
            sparsity, predicted = even_sparsity(costs, sizes, budget.share * dense)
            measured = dense * on_first(self.processes, partial(measure_random, *how, sparsity))
            costs = corrected(costs, [round(sparsity * size) for size in sizes], measured - predicted)
            advance(len(targets))
        self.progress.end_phase()
        return costs


def even_sparsity(costs: Costs, sizes: Sequence[int], wanted: float) -> tuple[float, float]:
    """Return the sparsity of all targets alike at which a model costs so much, and what it costs; neither 0 nor 1.

    Args:
        costs: of the model.
        sizes: units of each target.
        wanted: what it is to cost.
    """

    def cost(sparsity: float) -> float:
        return costs.of([round(sparsity * size) for size in sizes])

    low, high = LEAST_EVEN, MOST_EVEN
    while high - low > EVEN_STEP:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= wanted else (middle, high)
    return high, cost(high)


def corrected(costs: Costs, removals: Sequence[int], missing: float) -> Costs:
    """Return costs that add up to what was measured: of each layer that no longer runs as it is dense others.

    Args:
        costs: as they were predicted.
        removals: of each target, at which it was measured.
        missing: what was measured beyond the prediction; negative where that was too much.
    """
    pairs = list(zip(costs.curves, removals, strict=True))
    changed = sum(curve.costs[0] for curve, count in pairs if curve.at(count) < curve.costs[0])
    share = missing / changed if changed else 0.0

    def correct(curve: CostCurve) -> CostCurve:
        dense = curve.costs[0]
        moved = [cost if cost == dense else min(dense, max(0.0, cost + share * dense)) for cost in curve.costs]
        return CostCurve(curve.removals, tuple(moved))

    return replace(costs, curves=[correct(curve) for curve in costs.curves])


def on_first(processes: Processes, work: Callable[[], Any]) -> Any:
    """Return what the first process finds, as JSON has it, on every process; its CAPError is raised on all of them."""
    found, wrong = None, ""
    if processes.rank == 0:
        try:
            found = work()
        except CAPError as error:
            wrong = str(error)
    if wrong := processes.share_object(wrong):
        raise CAPError(wrong)
    return processes.share_object(found)


def curve_of(points: Sequence[tuple[int, float]]) -> CostCurve:
    """Return the curve through some points."""
    return CostCurve(tuple(int(removed) for removed, _ in points), tuple(float(cost) for _, cost in points))


def zeros_of(targets: Sequence[Target], unit: int) -> list[int]:
    """Return how many units of each target are 0 as a whole."""
    return [int(zero_units(target.to_blocks(target.weight.detach()), unit).sum()) for target in targets]


def counts_of(targets: Sequence[Target], unit: int) -> list[int]:
    """Return how many units each target has."""
    return [target.weight.numel() // unit for target in targets]
