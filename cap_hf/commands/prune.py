"""`cap-hf prune`: one collection; several sparsities, or the one that is searched for, each evaluated and saved."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cap_hf.checkpoints.atomic import check_place
from cap_hf.collection.resources import Resources
from cap_hf.commands.arguments import ModelArguments, ProbeArguments, beside, check_output, parse
from cap_hf.commands.budgeting import budget_columns, check_amounts
from cap_hf.commands.healing import HealArguments
from cap_hf.commands.prune_arguments import (
    Asked,
    PruneArguments,
    check_state,
    checkpoint_name,
    state_folder,
)
from cap_hf.commands.search_arguments import SearchArguments, check_search
from cap_hf.commands.tables import results_table
from cap_hf.commands.watching import as_typed
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments

if TYPE_CHECKING:
    from accelerate import Accelerator

# In the order of `Asked`.
KINDS = (
    ModelArguments,
    DataArguments,
    PruneArguments,
    SearchArguments,
    HealArguments,
    ProbeArguments,
    CAPConfig,
    Resources,
)


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    description = "Prune a vision model with CAP to one or several sparsities, or as far as a drop allows."
    asked = Asked(*parse(argv, "prune", description, *KINDS))
    args, search = asked.prune, asked.search
    check_search(search, args.sparsity or args.budget, args.num_recomputations, asked.config)
    if search.max_accuracy_drop is None:
        asked.sparsities = check_amounts(args, asked.config)
    check_state(args)
    args.command = as_typed("prune", argv, [asked.model.token])
    if not args.dry_run:
        check_output(args.output_dir, args.overwrite_output_dir or args.resume, state_folder(args))
        # Now, and not only after the pruning; the name of the one that is found will be as long.
        for sparsity in asked.sparsities or [search.sparsity_step]:
            check_place(Path(args.output_dir) / checkpoint_name(sparsity))
    prune(asked)


def prune(asked: Asked) -> None:
    """Do the work, once the arguments are right: load, collect, and per sparsity prune, heal, evaluate, save."""
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.atomic import write_json
    from cap_hf.checkpoints.places import real_path
    from cap_hf.checkpoints.saving import save_checkpoint
    from cap_hf.commands.common import hide_bars
    from cap_hf.commands.dry_run import Counts, print_plan
    from cap_hf.commands.preparing import prepare
    from cap_hf.commands.pruning import prune_each
    from cap_hf.commands.recording import Recorder, Watch
    from cap_hf.commands.searching import conclusion
    from cap_hf.data.images import collate
    from cap_hf.distributed.accelerator import make_accelerator
    from cap_hf.inference.example import size_of
    from cap_hf.masks import target_sparsity
    from cap_hf.report import Phases, now
    from cap_hf.targets import left_alone
    from cap_hf.tracking import Tracker

    args, started = asked.prune, now()
    if args.disable_tqdm:
        hide_bars()
    output = real_path(args.output_dir)
    accelerator, phases = make_accelerator(args.trackers, beside(output, "runs")), Phases()
    with phases("load"):
        run = prepare(asked, accelerator)
    model, compressor, healing, evaluation = run.model, run.compressor, run.healing, run.evaluation
    if args.dry_run:
        print_plan(compressor, run.loader, asked.data, asked.heal, Counts.of(run, asked), args.plan_for)
        accelerator.end_training()
        return
    settings = {"model_name_or_path": asked.model.model_name_or_path} | asdict(asked.data) | asked.config.to_dict()
    tracker = Tracker(accelerator, output.name, settings)
    recorder = Recorder(args.report, args.command, accelerator, max(1, len(asked.sparsities)))
    watch = Watch(recorder, tracker, phases)
    sparsity_dense, dense = target_sparsity(compressor.targets), None
    if evaluation is not None:
        # Before anything is pruned: the model that is compared with is this one.
        with phases("evaluate dense"):
            dense = evaluation.measure_dense(model)
    watch.measured_dense(sparsity_dense, evaluation, dense)
    facts: dict[str, object] = {"started": started, "dense": dense, "sparsity_dense": sparsity_dense}
    facts |= {"left_alone": left_alone(model, compressor.targets)}
    facts["image_size"] = size_of(model, collate([run.calibration[0]]))
    results = []
    for pruned in prune_each(run, asked, phases):
        # Now the config also says which loss the Fisher is made from.
        facts |= describe(asked.model, asked.data, compressor.config, accelerator)
        if pruned.search is not None and run.held_out is not None:
            facts["search"] = {"metric": run.held_out.metric} | pruned.search.to_dict()
        healed, stored = None, run.form
        if healing is not None:
            with phases(f"heal {pruned.sparsity:g}"):
                healed, stored = healing.heal(compressor, run.form)
        metrics = None
        if evaluation is not None:
            with phases(f"evaluate {pruned.sparsity:g}"):
                metrics = evaluation.measure(model)
        folder = output / checkpoint_name(pruned.sparsity)
        watch.measured(folder.name, compressor, evaluation, pruned.report, metrics)
        outcome: dict[str, object] = {"sparse": metrics, "pruning": pruned.report.to_dict(), "steps": pruned.steps}
        outcome |= {"recalibrated_batch_norm": pruned.norms, "healing": healed}
        if accelerator.is_main_process:
            whole, config = facts | outcome, compressor.config
            save_checkpoint(folder, model, config, whole, run.image_processor, companions=run.companions, form=stored)
        results.append({"checkpoint": folder.name} | outcome)
    if accelerator.is_main_process:
        write_json(output / "report.json", facts | {"results": results, "phases": phases.records})
        print(summary(dense, sparsity_dense, results))
        if pruned.search is not None and run.held_out is not None:
            print(f"\n{conclusion(pruned.search, run.held_out.metric, healing is not None)}")
        print(f"\n{len(results)} checkpoint(s) and report.json are in {output}")
        watch.recorder.write(output)
    compressor.discard_state()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def describe(
    model_args: ModelArguments, data_args: DataArguments, config: CAPConfig, accelerator: "Accelerator"
) -> dict[str, object]:
    """Return what a report says of the run; never a token."""
    from cap_hf.report import versions

    return {
        "model_name_or_path": model_args.model_name_or_path,
        "model_revision": model_args.model_revision,
        "data": asdict(data_args),
        "config": config.to_dict(),
        "seed": config.seed,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "versions": versions(),
    }


def summary(dense: dict | None, sparsity_dense: float, results: list[dict]) -> str:
    """Return the table of the dense model, which may be sparse already, and of every sparse one, as in the report."""
    return results_table(
        [
            ("dense", sparsity_dense, dense),
            *((result["checkpoint"], result["pruning"]["sparsity"], result["sparse"]) for result in results),
        ],
        dense,
        budget_columns([None, *(result["pruning"] for result in results)]),
    )
