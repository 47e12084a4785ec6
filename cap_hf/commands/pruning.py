"""The sparse models of `cap-hf prune`, one after the other: of each sparsity that was asked for, or the one found."""

from collections.abc import Iterator
from dataclasses import dataclass

from cap_hf.budget import Budget
from cap_hf.collection.state import Checkpointing
from cap_hf.commands.budgeting import ways_to
from cap_hf.commands.preparing import Run
from cap_hf.commands.prune_arguments import Asked, state_folder
from cap_hf.commands.search_arguments import SearchArguments
from cap_hf.commands.searching import teller
from cap_hf.report import Phases, PruneReport, SearchReport
from cap_hf.stepwise import prune_in_steps, start_of


@dataclass
class Pruned:
    """A model that was pruned, refitted and recalibrated, but not healed.

    Attributes:
        sparsity: that it was pruned to, or the budget.
        steps: sparsities on the way to it, and that itself.
        report: of the pruning.
        norms: names of the layers whose batch norm was estimated anew.
        search: what was measured to find the sparsity; None where it was asked for.
    """

    sparsity: float | Budget
    steps: list[float]
    report: PruneReport
    norms: list[str]
    search: SearchReport | None = None


def prune_each(run: Run, asked: Asked, phases: Phases) -> Iterator[Pruned]:
    """Collect, then prune the model in place to one sparsity after the other, and yield what was done for each.

    Args:
        run: what there is to work with; in between the model may be healed.
        asked: the arguments.
        phases: told how long each takes.
    """
    args, compressor, recomputations = asked.prune, run.compressor, asked.prune.num_recomputations
    ways = ways_to(asked.sparsities, recomputations, start_of(compressor))
    if recomputations:
        shares = [each for each in asked.sparsities if not isinstance(each, Budget)]
        reports = prune_in_steps(compressor, run.loader, shares, recomputations, run.recalibrates)
    else:
        checkpointing = None
        if args.checkpoint_every is not None:
            checkpointing = Checkpointing(state_folder(args), args.checkpoint_every, args.resume)
        with phases("collect"):
            compressor.collect(run.loader, checkpointing)
        reports = compressor.prune_each(asked.sparsities)
    if run.held_out is not None:
        yield found(run, asked.search, phases)
    for sparsity, way in zip(asked.sparsities, ways, strict=True):
        if run.healing is not None:
            run.healing.restore()
        with phases(f"prune {sparsity:g}"):
            report = next(reports)
        if run.refits:
            with phases(f"refit {sparsity:g}"):
                report = compressor.refit(run.loader)
        norms = []
        if run.recalibrates:
            with phases(f"batch norm {sparsity:g}"):
                norms = compressor.recalibrate_batch_norm(run.loader)
        yield Pruned(sparsity, way, report, norms)


def found(run: Run, args: SearchArguments, phases: Phases) -> Pruned:
    """Prune the model to the highest sparsity that loses no more than was allowed, and return what was done."""
    compressor, held_out = run.compressor, run.held_out
    assert held_out is not None
    assert args.max_accuracy_drop is not None
    tell = teller(held_out.metric, args.max_evaluations)
    with phases("search"):
        search = compressor.find_sparsity(
            held_out,
            args.max_accuracy_drop,
            run.loader,
            args.sparsity_step,
            args.max_evaluations,
            run.recalibrates,
            tell if run.accelerator.is_main_process else lambda evaluated: None,
        )
    assert compressor.report is not None  # it was pruned
    return Pruned(search.sparsity, [search.sparsity], compressor.report, search.recalibrated, search)
