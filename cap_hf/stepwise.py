"""Prune in steps, each with a Fisher of its own: a quadratic model is asked for less of the way at a time."""

from collections.abc import Iterator, Sequence

from cap_hf.collection.running import Batches
from cap_hf.compressor import CAPCompressor
from cap_hf.errors import CAPError
from cap_hf.masks import count_zeros
from cap_hf.report import PruneReport


def steps_towards(sparsity: float, num_recomputations: int, start: float = 0.0) -> list[float]:
    """Return the sparsities on the way to the last one, which keep the same share of what the one before has kept.

    Args:
        sparsity: in [0, 1).
        num_recomputations: steps before the last.
        start: sparsity of the model as it is, no more than the other.

    Raises:
        CAPError: the number is below 0.
    """
    if num_recomputations < 0:
        raise CAPError(f"num_recomputations={num_recomputations} must be at least 0")
    kept, ratio = 1 - start, (1 - sparsity) / (1 - start)
    steps = [1 - kept * ratio ** (step / (num_recomputations + 1)) for step in range(1, num_recomputations + 1)]
    return [*steps, sparsity]


def prune_in_steps(
    compressor: CAPCompressor,
    dataloader: Batches,
    sparsities: Sequence[float],
    num_recomputations: int,
    refits: bool = False,
    recalibrates: bool = False,
) -> Iterator[PruneReport]:
    """Prune the model in place to one sparsity after the other, and yield the report of each one's last step.

    For each sparsity the model begins as it is now, and goes through `num_recomputations` more sparsities on its way;
    at every one of them the Fisher is collected anew from what is left. Between two sparsities the model may be
    refitted or trained.

    Args:
        compressor: whose model it is; what it was pruned to before is not gone back on.
        dataloader: as `CAPCompressor.collect` takes it, not an iterator: it is gone through again in every step.
        sparsities: shares of all target weights.
        num_recomputations: collections for a sparsity beside its first.
        refits: refit what every step but the last has left.
        recalibrates: estimate batch norm anew after every step but the last.

    Raises:
        CAPError: as of `CAPCompressor.collect`, `prune`, `refit` and `recalibrate_batch_norm`, and of `steps_towards`.
    """
    dense = {name: value.clone() for name, value in compressor.model.state_dict().items()}
    zeros, total = count_zeros(compressor.targets)
    for sparsity in sparsities:
        compressor.model.load_state_dict(dense)
        compressor.check_sparsity(sparsity)
        for step in steps_towards(sparsity, num_recomputations, zeros / total)[:-1]:
            compressor.collect(dataloader).prune(step)
            if refits:
                compressor.refit(dataloader)
            if recalibrates:
                compressor.recalibrate_batch_norm(dataloader)
        yield compressor.collect(dataloader).prune(sparsity)
