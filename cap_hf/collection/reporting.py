"""What a report says of a model that has been pruned, and of one that has been refitted then."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from cap_hf.budget import Budget
from cap_hf.collection.budgets import Budgets
from cap_hf.config import CAPConfig
from cap_hf.masks import describe_masks
from cap_hf.report import LayerReport, PruneReport, RefitReport
from cap_hf.targets import Target, summarize

logger = logging.getLogger(__name__)


def report_pruning(
    targets: Sequence[Target],
    config: CAPConfig,
    amount: float | Budget,
    losses: Sequence[float | None],
    budgets: Budgets | None = None,
) -> PruneReport:
    """Return what was removed where, and name the targets in which nothing is left in a warning.

    Args:
        targets: as they are after pruning.
        config: by which they were pruned.
        amount: the sparsity that was asked for, or the budget.
        losses: of each target; None where there is no Fisher.
        budgets: where a budget was asked for, what the model costs.

    Raises:
        CAPError: the pruned model cannot be measured.
    """
    requested = None if isinstance(amount, Budget) else amount
    report = PruneReport(config.method, config.allocation, config.selection, requested, pattern=config.pattern)
    if isinstance(amount, Budget) and budgets is not None:
        report.budget = budgets.report(amount, config, targets)
    for target, loss in zip(targets, losses, strict=True):
        (mask,) = describe_masks([target])
        report.layers.append(LayerReport(**mask, block_size=target.block_size, loss=loss))
    collapsed = [layer.name for layer in report.layers if layer.num_zeros == layer.num_weights]
    if collapsed:
        logger.warning("No weight is left in %s: consider --exclude or a lower sparsity.", summarize(collapsed, 3))
    return report


def report_refit(report: PruneReport, targets: Sequence[Target], refit: RefitReport, dtype: torch.dtype | None) -> None:
    """Have a report say of a refit too, with the zeros that there are now.

    Args:
        report: of the pruning.
        targets: as they are after the refit.
        refit: what was done.
        dtype: that the weights were rounded to; what was too small for it is told in a warning.
    """
    report.refit = refit
    recount(report, targets, "refitted", dtype)


def recount(report: PruneReport, targets: Sequence[Target], done: str, dtype: torch.dtype | None) -> None:
    """Have a report tell of the zeros that there are now, after the surviving weights have moved.

    Args:
        report: of the pruning.
        targets: as they are.
        done: what has moved them, for the warning: "refitted".
        dtype: that they were rounded to; what was too small for it is told in a warning.
    """
    before = report.num_zeros
    for index, mask in enumerate(describe_masks(targets)):
        report.layers[index] = replace(report.layers[index], **mask)
    if report.num_zeros > before:
        logger.warning("%d %s weights are too small for %s and have become 0.", report.num_zeros - before, done, dtype)
