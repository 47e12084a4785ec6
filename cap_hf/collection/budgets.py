"""What budgets are counted in: multiply-adds, bytes and seconds of a model, by target; spent, checked and reported."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from cap_hf.budget import KINDS, Budget, CostCurve, corrected, curve_of
from cap_hf.checkpoints.sizes import compressed_points, measure_model, saved_tensors
from cap_hf.collection.closing import TOLERANCE, Try, close_in, nearest
from cap_hf.collection.progress import Progress
from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.inference.example import Inputs, make_example
from cap_hf.inference.latency import Measured, latency_points, measure_share, on_cpu, sparse_layers
from cap_hf.inference.positions import count_positions
from cap_hf.masks import zero_units
from cap_hf.method.allocation import allocate
from cap_hf.method.spending import spend
from cap_hf.patterns import unit_of
from cap_hf.report import BudgetReport
from cap_hf.targets import Target

logger = logging.getLogger(__name__)

# What costs are counted in.
COUNTED_IN = {"flops": "multiply-adds", "bytes": "bytes", "latency": "seconds", "latency-int8": "seconds"}
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
        empty: of seconds, which share of them was measured with every target 0; None of what is counted.
        known: of seconds, shares that were predicted and measured, of which every latency that is spent adds some.
    """

    curves: list[CostCurve]
    fixed: float
    dense: float
    empty: Measured | None = None
    known: list[tuple[float, float]] = field(default_factory=list)

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
        self._costs: dict[tuple[str, int], Costs] = {}
        # Of each latency, what was predicted of the model that it was spent on.
        self._predicted: dict[Budget, float] = {}
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
        least, error = costs.empty or (costs.of(counts_of(targets, unit)) / costs.dense, 0.0)
        # In doubt it is tried.
        if least - error > budget.share:
            raise CAPError(
                f"{budget} cannot be met: with every target 0, {least:.1%} of {KINDS[budget.kind]} would be left"
            )
        if costs.empty is not None and costs.of(counts_of(targets, unit)) >= costs.dense * (1 - ROUNDING):
            raise CAPError(
                f"{budget} cannot be spent: no layer alone was measured to be faster for its zeros: name a sparsity, "
                "or measure on a quieter machine"
            )
        # What a sparse model takes is measured when the budget is spent.
        if not budget.is_latency:
            now = self.costs(budget, targets, 1).of(entries) / costs.dense
            if now < budget.share * (1 - ROUNDING):
                raise CAPError(taken_already(budget, now))
        return budget

    def spend(self, budget: Budget, config: CAPConfig, paths: RemovalPaths) -> list[torch.Tensor]:
        """Return how many units each of this process's blocks gives up for a budget, `(n,)` int64 for each target.

        A latency is spent on a model of these zeros, which is measured, and again, until what is measured is what was
        asked for; a line says of each try what was predicted and measured.

        Raises:
            CAPError: the model is faster than a latency already.
        """
        compared, unit = paths.compared(config), unit_of(config.structure)
        costs = self.costs(budget, paths.targets, unit)

        def within(cost: float) -> list[int]:
            return spend(compared, costs.curves, cost - costs.fixed, self.processes)

        def blocks(quotas: Sequence[int]) -> list[torch.Tensor]:
            return [counts for (counts,) in allocate([[path] for path in compared], quotas, self.processes)]

        if costs.empty is None:
            return blocks(within(budget.share * costs.dense))
        zeros, numbers = paths.count_zeros(unit), itertools.count(1)
        # Not below what all removals leave, where sums are rounded.
        least = costs.of(counts_of(paths.targets, unit)) * (1 + ROUNDING)

        def attempt(share: float) -> Try[list[torch.Tensor]]:
            quotas = within(max(share * costs.dense, least))
            found, predicted = blocks(quotas), costs.of(quotas) / costs.dense
            removed = dict(paths.removed(sparse, found, unit))
            measured, error = self._measure(budget, paths.targets, removed)
            if Try(found, predicted, measured, error).meets(budget.share):
                again = self._measure(budget, paths.targets, removed)  # it may come so near by chance
                measured, error = (measured + again.share) / 2, (error**2 + again.error**2) ** 0.5 / 2
            self.progress.say(
                f"{budget}, try {next(numbers)}: predicted {predicted:.4f} of the dense latency, "
                f"measured {measured:.4f} ± {error:.4f}"
            )
            if quotas == zeros and measured + error < budget.share * (1 - TOLERANCE):
                raise CAPError(taken_already(budget, measured))
            return Try(found, predicted, measured, error)

        sparse = sparse_layers(paths.targets, budget.kind.endswith("int8"))
        tries = close_in(attempt, budget.share, costs.known)
        costs.known.extend((each.predicted, each.measured) for each in tries)
        best = nearest(tries, budget.share)
        if not best.within(budget.share) and best.measured >= 1 - best.error:
            raise CAPError(
                f"{budget} cannot be met: of {len(tries)} models none was faster than the dense one, which with every "
                f"target 0 takes {costs.empty.share:.4f}: ask for a share nearer to that, or measure "
                "on a quieter machine"
            )
        self._predicted[budget] = best.predicted
        return best.found

    def costs(self, budget: Budget, targets: Sequence[Target], unit: int) -> Costs:
        """Return what a model costs in the measure of a budget; its zeros make no difference.

        Args:
            budget: of some kind, perhaps with an example.
            targets: of the model.
            unit: weights that are removed together.
        """
        if (budget.kind, unit) not in self._costs:
            find = {"flops": self._flops, "bytes": self._bytes}.get(budget.kind, partial(self._seconds, budget))
            if budget.kind != "bytes":
                self._example = dict(budget.example_inputs or make_example(self.model))
            self._costs[budget.kind, unit] = find(targets, unit)
        return self._costs[budget.kind, unit]

    def report(self, budget: Budget, config: CAPConfig, targets: Sequence[Target]) -> BudgetReport:
        """Return what came out of a budget, of a model that has been pruned to it; of a latency it is also measured."""
        costs = self.costs(budget, targets, unit_of(config.structure))
        predicted, error, threads = None, None, None
        if budget.kind == "flops":
            kept = float(sum(self._positions[each.name] * int(each.weight.count_nonzero()) for each in targets))
        elif budget.kind == "bytes":
            kept = float(measure_model(self.model, self.dtype)[1])
        else:
            # Once more: of several tries the one that comes nearest may do so by chance.
            share, error = self._measure(budget, targets, {})
            kept, predicted, threads = share * costs.dense, self._predicted[budget], torch.get_num_threads()
            self.progress.say(
                f"{budget}: asked {budget.share:.4f} of the dense latency, predicted {predicted:.4f}, measured "
                f"{share:.4f} ± {error:.4f}"
            )
            # Two errors: what chance alone does more seldom than once in twenty times.
            last = Try(None, predicted, share, 2 * error)
            if not last.meets(budget.share):
                way = " is undercut: measured " if last.within(budget.share) else " is exceeded: measured "
                why = "as layers become faster in jumps or the machine is busy"
                logger.warning("%s%s%.4f ± %.4f, %s", budget, way, share, error, why)
        return BudgetReport(
            kind=budget.kind,
            requested=budget.share,
            achieved=kept / costs.dense,
            kept=kept,
            dense=costs.dense,
            counted_in=COUNTED_IN[budget.kind],
            predicted=predicted,
            error=error,
            threads=threads,
        )

    def _measure(self, budget: Budget, targets: Sequence[Target], weights: Mapping[str, torch.Tensor]) -> Measured:
        """Return what share of its dense latency the model takes with some targets' weights in the place of its own."""

        def work() -> Measured:
            assert self._example is not None
            pruned = on_cpu(self.model)
            with torch.no_grad():
                for name, weight in weights.items():
                    pruned.get_parameter(f"{name}.weight").copy_(weight)
            return measure_share(self.model, pruned, self._example, budget.kind.endswith("int8"))

        return Measured(*self.processes.on_first(work))

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
        int8, advance = budget.kind.endswith("int8"), self.progress.phase("measuring", "layer", len(targets))
        work = partial(latency_points, self.model, targets, self._example, int8, unit, advance)
        points, fixed, dense = self.processes.on_first(work)
        named = {target.name: target.weight for target in targets}
        zeros = {name: torch.zeros_like(named[name]) for name in sparse_layers(targets, int8)}
        empty = self._measure(budget, targets, zeros)
        self.progress.end_phase()
        curves = corrected([curve_of(each) for each in points], dense * empty.share - fixed)
        costs = Costs(curves, fixed, dense, empty, [(1.0, 1.0)])
        costs.known.append((costs.of(counts_of(targets, unit)) / dense, empty.share))
        return costs


def taken_already(budget: Budget, share: float) -> str:
    """Return what is said of a budget that is more than a model takes."""
    return f"the model takes {share:.4%} of {KINDS[budget.kind]} already: {budget} would be more"


def zeros_of(targets: Sequence[Target], unit: int) -> list[int]:
    """Return how many units of each target are 0 as a whole."""
    return [int(zero_units(target.to_blocks(target.weight.detach()), unit).sum()) for target in targets]


def counts_of(targets: Sequence[Target], unit: int) -> list[int]:
    """Return how many units each target has."""
    return [target.weight.numel() // unit for target in targets]
