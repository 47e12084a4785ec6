"""The highest sparsity at which a score drops by no more than is allowed, by bisection over the multiples of a step."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Protocol

from transformers import PreTrainedModel

from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.collection.resources import Afterwards
from cap_hf.collection.running import Batches
from cap_hf.collection.scores import Scored, drop_of, read_score, size_of, value_of
from cap_hf.config import CAPConfig, check_type, is_number
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.masks import count_zeros
from cap_hf.method.methods import METHODS
from cap_hf.patterns import unit_of
from cap_hf.report import Evaluated, PruneReport, SearchReport
from cap_hf.targets import Target

logger = logging.getLogger(__name__)

# Standard errors that lie between a drop and what is allowed where one knows which is the larger.
SURE = 2


class Searched(Protocol):
    """What a search asks of a `CAPCompressor`."""

    model: PreTrainedModel
    config: CAPConfig
    targets: list[Target]
    processes: Processes
    afterwards: Afterwards
    paths: RemovalPaths | None
    report: PruneReport | None

    def prune(self, sparsity: float | None = None) -> PruneReport:
        """As `CAPCompressor.prune`."""

    def refit(self, dataloader: Batches) -> PruneReport:
        """As `CAPCompressor.refit`."""

    def recalibrate_batch_norm(self, dataloader: Batches) -> list[str]:
        """As `CAPCompressor.recalibrate_batch_norm`."""


def find_sparsity(
    self: Searched,
    evaluate: Callable[[PreTrainedModel], Scored],
    max_drop: float,
    dataloader: Batches | None = None,
    step: float = 0.01,
    max_evaluations: int = 8,
    recalibrates: bool = False,
    on_evaluation: Callable[[Evaluated], None] = lambda evaluated: None,
) -> SearchReport:
    """Prune the model in place to the highest sparsity at which a score drops by no more than `max_drop`.

    All sparsities are pruned to from the one collection, so this begins, as `prune` does, with the weights at
    `collect`. The multiples of `step` are bisected: where a higher sparsity costs no less, the next multiple breaks
    what is allowed. Each model is refitted before it is measured, if the compressor was made with `refits=True`.

    Args:
        evaluate: gets the model, and returns what it scores on images that are neither among those of `dataloader` nor
            those that the result is reported on; higher is better. A tensor `(n,)` holds the score of each of n images,
            always the same ones in the same order: the drop then has the standard error of the differences. A
            `Score(value, error)` has an error of its own, a float none. With several processes all of them call it, and
            the first one's score counts.
        max_drop: of the score, in its own units, 0 or more.
        dataloader: as `refit` takes it, not an iterator; needed where something is refitted or recalibrated.
        step: that sparsities are multiples of, in (0, 1).
        max_evaluations: of sparse models; with fewer than the bisection takes, the result is lower than it might be.
        recalibrates: estimate batch norm anew in each model.
        on_evaluation: told of each model that was measured.

    Returns:
        What was measured, and the sparsity that was found; the model is pruned to it, and `self.report` tells of it.

    Raises:
        CAPError: an argument is wrong, `collect` was not called, or the score is not finite; or none of the sparsities
            that were tried keeps what is asked for: the model has the weights at `collect` then.
    """
    _check(self, max_drop, dataloader, step, max_evaluations, recalibrates)
    _put_back(self)
    grid = sparsity_grid(step, self.targets, unit_of(self.config.structure))
    dense = read_score(evaluate(self.model), "the dense model")
    report = SearchReport(max_drop, step, value_of(dense), size_of(dense))

    def prune_to(sparsity: float) -> None:
        self.prune(sparsity)
        if self.afterwards.refits:
            self.refit(dataloader or [])
        if recalibrates:
            report.recalibrated = self.recalibrate_batch_norm(dataloader or [])

    kept, refused = grid.start - 1, grid.stop
    while refused - kept > 1 and len(report.evaluations) < max_evaluations:
        middle, start = (kept + refused) // 2, time.perf_counter()
        sparsity = _multiple(step, middle)
        prune_to(sparsity)
        score = read_score(evaluate(self.model), f"the model of sparsity {sparsity:g}")
        # Rounding may differ between processes: they go by the first one's figures.
        value, (drop, error) = self.processes.share_object([value_of(score), drop_of(dense, score)])
        seconds = round(time.perf_counter() - start, 3)
        evaluated = Evaluated(sparsity, value, drop, error, drop <= max_drop, seconds)
        report.evaluations.append(evaluated)
        kept, refused = (middle, refused) if evaluated.kept else (kept, middle)
        on_evaluation(evaluated)
    if kept < grid.start:
        # Nobody asked for any of these.
        _put_back(self)
        raise CAPError(_nothing_kept(report, refused == grid.start))
    report.sparsity, report.complete = _multiple(step, kept), refused - kept == 1
    if report.evaluations[-1].sparsity != report.sparsity:
        prune_to(report.sparsity)
    for line in remarks(report):
        logger.warning("%s", line)
        report.remarks.append(line)
    return report


def _put_back(searched: Searched) -> None:
    """Make a model what it was at `collect`, if it was pruned since; then no report tells of it."""
    if searched.paths is not None and searched.report is not None:
        searched.paths.put_back()
        searched.report = None


def remarks(report: SearchReport) -> Iterator[str]:
    """Yield what should be known of what was found: that noise may have decided, and that there may be more."""
    errors = [each.drop_se for each in (report.found, report.refused) if each is not None and each.drop_se is not None]
    error = max(errors, default=0.0)
    if error > report.max_drop:
        line = f"The standard error of the drop, {error:.4f}, is larger than what is allowed, {report.max_drop:g}"
        if report.num_examples is None or not report.max_drop:
            yield f"{line}: the search goes by noise."
        else:
            # The error falls with the root of the number of images.
            wanted = math.ceil(report.num_examples * (SURE * error / report.max_drop) ** 2)
            yield f"{line}: {report.num_examples} images cannot tell, about {wanted} would."
    if not report.complete:
        yield (
            f"{len(report.evaluations)} evaluations were too few to try all multiples of {report.step:g} above "
            f"{report.sparsity:g}: more of them may find more."
        )
    elif report.refused is None:
        yield (
            f"Sparsity {report.sparsity:g} is the highest multiple of {report.step:g}, and does not lose too much: a "
            "smaller step goes further."
        )


def _check(
    self: Searched, max_drop: float, dataloader: Batches | None, step: float, max_evaluations: int, recalibrates: bool
) -> None:
    """Raise the CAPErrors of `find_sparsity` about its arguments."""
    check_step(step)
    if not is_number(max_drop) or not 0 <= max_drop < math.inf:
        raise CAPError(f"max_drop={max_drop!r:.80} must be a number of at least 0")
    check_type("max_evaluations", max_evaluations, int, "pass a whole number")
    if max_evaluations < 1:
        raise CAPError(f"max_evaluations={max_evaluations} must be at least 1")
    if self.config.nm is not None:
        raise CAPError(f"allocation={self.config.allocation} has one sparsity, and there is nothing to search for")
    if self.paths is None and METHODS[self.config.method].statistic is not None:
        raise CAPError("call collect(dataloader) before find_sparsity: there is no Fisher yet")
    if self.afterwards.refits or recalibrates:
        if dataloader is None:
            raise CAPError("each model is refitted or recalibrated before it is measured: pass a dataloader for that")
        if isinstance(dataloader, Iterator):
            raise CAPError("a search goes through the examples again and again: pass a DataLoader or a list of batches")


def sparsity_grid(step: float, targets: list[Target], unit: int = 1) -> range:
    """Return the whole numbers by which a step is multiplied to the sparsities that a model can be pruned to.

    Args:
        step: in (0, 1).
        targets: of the model, as it is.
        unit: weights that go together.

    Raises:
        CAPError: the step is outside that, or no multiple of it is left.
    """
    check_step(step)
    zeros, total = count_zeros(targets, unit)
    last = math.ceil(1 / Decimal(str(step))) - 1
    # As sparsities are rounded to units where they are pruned to.
    first = next((number for number in _from(zeros, total, step) if round(total * _multiple(step, number)) >= zeros), 1)
    if first > last:
        raise CAPError(f"the model is {zeros / total:.4%} sparse already: no multiple of {step:g} below 1 is more")
    return range(first, last + 1)


def check_step(step: float) -> None:
    """Raise a CAPError unless there are multiples of a step between 0 and 1, and not too many to tell apart."""
    if not is_number(step) or not 1e-6 <= step < 1:
        raise CAPError(f"step={step!r:.80} must be at least 1e-06 and less than 1")


def _from(zeros: int, total: int, step: float) -> Iterator[int]:
    """Yield the multiples that the first one at or above a share of zeros is among."""
    about = int(zeros / total / step)
    yield from range(max(1, about - 1), about + 3)


def _multiple(step: float, number: int) -> float:
    """Return a multiple of a step as decimals have it: 3 times 0.1 is 0.3."""
    return float(number * Decimal(str(step)))


def _nothing_kept(report: SearchReport, all_tried: bool) -> str:
    """Return what to say where no sparsity keeps what is asked for."""
    lowest = min(report.evaluations, key=lambda each: each.sparsity)
    lost = f"sparsity {lowest.sparsity:g} loses {lowest.lost}, and {report.max_drop:g} is allowed"
    if all_tried:
        return f"even {lost}: allow more"
    return f"{lost}; it is the lowest of {len(report.evaluations)} that were tried: allow more, or more evaluations"
