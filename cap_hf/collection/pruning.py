"""From removal paths to the weights of a model at one sparsity or several."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from cap_hf.budget import Budget
from cap_hf.checkpoints.form import check_range, round_weights, too_large
from cap_hf.collection.budgets import Budgets
from cap_hf.collection.collection import Collection
from cap_hf.collection.parts import Tensors
from cap_hf.collection.progress import Progress
from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.config import CAPConfig
from cap_hf.patterns import Pattern, unit_of


def eliminate(paths: RemovalPaths, pattern: Pattern | None, progress: Progress) -> None:
    """Find the removal paths of a pattern, unless they are there; errors as of `RemovalPaths.eliminate`."""
    if not paths.is_eliminated(pattern):
        paths.eliminate(pattern, partial(progress.phase, "eliminating", "block"))


def solve_each(
    paths: RemovalPaths,
    config: CAPConfig,
    sparsities: Sequence[float | Budget | None],
    progress: Progress,
    collection: Collection | None,
    budgets: Budgets,
) -> Iterator[tuple[float | Budget, Tensors, torch.Tensor]]:
    """Yield what a model is pruned to, one sparsity after the other: what `RemovalPaths.reconstruct` returns of each.

    Fishers are made from sums once for all sparsities that are solved for together, and so are sums collected anew.

    Args:
        paths: of the model.
        config: for the allocation and the selection.
        sparsities: as `CAPCompressor.prune` takes them.
        progress: told what goes on.
        collection: that the paths come from, which says how many of them are solved for together; None where nothing
            was collected.
        budgets: what the model costs.

    Raises:
        CAPError: a sparsity is out of range, below the model's, or not the N:M pattern's; a budget is more than the
            model takes, or too little; a block cannot be solved for.
    """
    zeros = paths.count_zeros(unit_of(config.structure))
    entries = paths.count_zeros()
    exact = [budgets.check(each, config, paths.targets, zeros, entries) for each in sparsities]
    eliminate(paths, config.structure, progress)
    at_once = 1 if collection is None else collection.together(len(exact))
    for first in range(0, len(exact), at_once):
        together = exact[first : first + at_once]
        counts = [
            budgets.spend(each, config, paths) if isinstance(each, Budget) else paths.allocate(config, each)
            for each in together
        ]
        # Collected anew there is one phase for each group of layers, and otherwise one was foreseen for each sparsity.
        times = len(together) if paths.recollection is None else 1
        solved = paths.reconstruct(counts, partial(progress.phase, "reconstructing", "block", times=times))
        for sparsity, (pruned, losses) in zip(together, solved, strict=True):
            progress.end_phase()
            yield sparsity, pruned, losses


def write_pruned(model: nn.Module, paths: RemovalPaths, pruned: Tensors, dtype: torch.dtype | None) -> None:
    """Make new blocks a model's weights, rounded to what it will be stored in.

    Args:
        model: whose targets they are of.
        paths: of the model.
        pruned: of this process's blocks, as `reconstruct` returns them.
        dtype: that the model will be stored in, None for its own.

    Raises:
        CAPError: a weight is too large for the dtype; nothing has changed then.
    """
    names = {target.weight: target.name for target in paths.targets}
    wrong = too_large(model, dtype, lambda each: pruned[names[each]] if each in names else each)
    check_range(paths.processes.share_first(wrong))
    paths.write(pruned)
    round_weights(model, dtype)
