"""Prune in steps, each with a Fisher of its own: a quadratic model is asked for less of the way at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cap_hf.budget import Budget
from cap_hf.collection.running import Batches
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig, check_type
from cap_hf.errors import CAPError
from cap_hf.masks import count_zeros
from cap_hf.method.methods import METHODS
from cap_hf.patterns import unit_of
from cap_hf.report import PruneReport


def steps_towards(sparsity: float, num_recomputations: int, start: float = 0.0) -> list[float]:
    """Return the sparsities on the way to the last one: every step keeps half of what the one before has kept.

    Counted back from the last, since it is there that the gradients of the dense model say least: the first steps may
    be none, where half of the model is more than is asked for. Steps of equal shares from the dense model on were
    measured to be worth less.

    Args:
        sparsity: in [0, 1).
        num_recomputations: steps before the last at most, 0 or more.
        start: sparsity of the model as it is, no more than the other.
    """
    steps = [1 - (1 - sparsity) * 2**step for step in range(num_recomputations, 0, -1)]
    return [*(step for step in steps if step > start), sparsity]


def start_of(compressor: CAPCompressor) -> float:
    """Return the sparsity that steps begin with: the share of units that are 0 as a whole."""
    zeros, total = count_zeros(compressor.targets, unit_of(compressor.config.structure))
    return zeros / total


def check_steps(config: CAPConfig, num_recomputations: int, refits: bool) -> None:
    """Check that a Fisher can be collected anew on the way.

    Raises:
        CAPError: the number is no whole one of at least 0; or it is above 0, and the allocation is N:M, which has
            nothing on the way to it, or nothing would be another than without.
    """
    check_type("num_recomputations", num_recomputations, int, "pass a whole number")
    if num_recomputations < 0:
        raise CAPError(f"num_recomputations={num_recomputations} must be at least 0")
    if not num_recomputations:
        return
    if config.nm is not None:
        raise CAPError(f"{config.nm} has no sparsities on the way to it: leave out --num_recomputations")
    if METHODS[config.method].statistic is None and not refits:
        raise CAPError(f"method={config.method} collects nothing that could be anew: leave out --num_recomputations")


def prune_in_steps(
    compressor: CAPCompressor,
    dataloader: Batches,
    sparsities: Sequence[float],
    num_recomputations: int,
    recalibrates: bool = False,
) -> Iterator[PruneReport]:
    """Prune the model in place to one sparsity after the other, and yield the report of each one's last step.

    For each sparsity the model begins as it is now, and goes through `num_recomputations` more sparsities on its way
    (see `steps_towards`); at every one of them the Fisher is collected anew from what is left, with the block size of
    the first. Between two sparsities the model may be refitted or trained.

    Args:
        compressor: whose model it is; with `refits` it refits what every step but the last has left.
        dataloader: as `CAPCompressor.collect` takes it, not an iterator: it is gone through again in every step.
        sparsities: shares of all target weights.
        num_recomputations: collections for a sparsity beside its first, at most.
        recalibrates: estimate batch norm anew after every step but the last.

    Returns:
        An iterator of reports; their losses are those of the last step alone.

    Raises:
        CAPError: as of `check_steps`, or a sparsity cannot be pruned to, before any work; later as of
            `CAPCompressor.collect`, `prune`, `refit` and `recalibrate_batch_norm`.
    """
    check_type("sparsities", sparsities, Sequence, "pass such as [0.75, 0.9]")
    check_steps(compressor.config, num_recomputations, compressor.afterwards.refits)
    if isinstance(dataloader, Iterator):
        raise CAPError("steps go through the examples again and again: pass a DataLoader or a list of batches")
    for sparsity in sparsities:
        if isinstance(sparsity, Budget):
            raise CAPError(f"{sparsity} has no sparsities on the way to it: prune to it with CAPCompressor.prune")
        compressor.check_sparsity(sparsity)
    return _steps(compressor, dataloader, sparsities, num_recomputations, recalibrates)


def _steps(
    compressor: CAPCompressor,
    dataloader: Batches,
    sparsities: Sequence[float],
    num_recomputations: int,
    recalibrates: bool,
) -> Iterator[PruneReport]:
    model = compressor.model
    dense = {name: value.clone() for name, value in model.state_dict().items()} if len(sparsities) > 1 else None
    start = start_of(compressor)
    for sparsity in sparsities:
        if dense is not None:
            model.load_state_dict(dense)
        *before, last = steps_towards(sparsity, num_recomputations, start)
        for step in before:
            _collect(compressor, dataloader).prune(step)
            if compressor.afterwards.refits:
                compressor.refit(dataloader)
            if recalibrates:
                compressor.recalibrate_batch_norm(dataloader)
        yield _collect(compressor, dataloader).prune(last)


def _collect(compressor: CAPCompressor, dataloader: Batches) -> CAPCompressor:
    """Collect, and stay with the block size that the memory has allowed: the next step may find less of it free."""
    compressor.collect(dataloader)
    if compressor.plan is not None and compressor.config.fisher_block_size == "auto":
        compressor.config = replace(compressor.config, fisher_block_size=str(compressor.plan.block_size))
    return compressor
