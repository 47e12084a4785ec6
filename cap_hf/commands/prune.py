"""`cap-hf prune`: one collection, several sparsities, each evaluated and saved."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cap_hf.checkpoints.atomic import check_place
from cap_hf.collection.resources import Resources
from cap_hf.commands.arguments import ModelArguments, ProbeArguments, beside, check_output, parse
from cap_hf.commands.healing import HealArguments, Healing
from cap_hf.commands.prune_arguments import (
    PruneArguments,
    check_sparsities,
    check_state,
    checkpoint_name,
    state_folder,
)
from cap_hf.commands.tables import results_table
from cap_hf.commands.watching import as_typed
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError

if TYPE_CHECKING:
    from accelerate import Accelerator


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    description = "Prune a vision model with CAP to one or several sparsities."
    model_args, data_args, args, heal_args, probe_args, config, resources = parse(
        argv,
        "prune",
        description,
        ModelArguments,
        DataArguments,
        PruneArguments,
        HealArguments,
        ProbeArguments,
        CAPConfig,
        Resources,
    )
    sparsities = check_sparsities(args.sparsity, config)
    check_state(args)
    args.command = as_typed("prune", argv)
    if not args.dry_run:
        check_output(args.output_dir, args.overwrite_output_dir or args.resume, state_folder(args))
        # Now, and not only after the pruning.
        for sparsity in sparsities:
            check_place(Path(args.output_dir) / checkpoint_name(sparsity))
    prune(model_args, data_args, args, heal_args, probe_args, config, resources, sparsities)


def prune(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PruneArguments,
    heal_args: HealArguments,
    probe_args: ProbeArguments,
    config: CAPConfig,
    resources: Resources,
    sparsities: list[float],
) -> None:
    """Do the work, once the arguments are right: load, collect, and per sparsity prune, heal, evaluate, save."""
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.atomic import write_json
    from cap_hf.checkpoints.places import real_path
    from cap_hf.checkpoints.saving import save_checkpoint
    from cap_hf.collection.batch_norm import batch_norms
    from cap_hf.collection.examples import whole_groups
    from cap_hf.collection.objective import check_loss
    from cap_hf.collection.state import Checkpointing
    from cap_hf.commands.common import hide_bars, image_dataset, load_all, load_companions, load_form
    from cap_hf.commands.dry_run import Counts, print_plan
    from cap_hf.commands.evaluation import Evaluation
    from cap_hf.commands.recording import Recorder, Watch
    from cap_hf.compressor import CAPCompressor
    from cap_hf.data.images import calibration_split, collate, make_dataloader
    from cap_hf.distributed.accelerator import make_accelerator
    from cap_hf.inference.example import size_of
    from cap_hf.masks import target_sparsity
    from cap_hf.method.methods import METHODS
    from cap_hf.report import Phases
    from cap_hf.stepwise import check_steps, prune_in_steps, start_of, steps_towards
    from cap_hf.targets import left_alone
    from cap_hf.tracking import Tracker

    if args.disable_tqdm:
        hide_bars()
    output = real_path(args.output_dir)
    accelerator, phases = make_accelerator(args.trackers, beside(output, "runs")), Phases()
    refits = METHODS[config.method].refits(config)
    num_examples = max(config.num_examples, config.refit_examples if refits else 0)
    check_steps(config, args.num_recomputations, refits)
    with phases("load"):
        model, image_processor, splits = load_all(
            model_args,
            data_args,
            config.seed,
            ["train", "eval"] if args.do_eval else ["train"],
            max(num_examples, heal_args.num_images(accelerator.num_processes)),
            probe_args.knn_bank_size,
            num_examples,
        )
        companions, form = load_companions(model_args), load_form(model_args, model)
        prunes = 1 if args.num_recomputations else len(sparsities)
        compressor = CAPCompressor(model, config, accelerator, args.disable_tqdm, resources, prunes, form.dtype, refits)
        for sparsity in sparsities:
            compressor.check_sparsity(sparsity)
        sparsity_dense, start = target_sparsity(compressor.targets), start_of(compressor)
        examples = calibration_split(splits["train"], num_examples, config.seed)
        calibration = image_dataset(examples, image_processor, model, data_args)
        if config.fisher_loss == "labels":
            calibration.need_labels()
        if config.fisher_loss is not None:
            check_loss(config.fisher_loss, model, collate([calibration[0]]))
        batch_size = whole_groups(args.per_device_batch_size, config)
        workers = data_args.dataloader_num_workers
        train_loader = make_dataloader(calibration, batch_size, workers, accelerator.device)
        healing = None
        if heal_args.heal_steps:
            images = image_dataset(splits["train"], image_processor, model, data_args)
            healing = Healing(model, images, heal_args, config.seed, workers, accelerator, args.disable_tqdm)
        evaluation = None
        if args.do_eval:
            evaluation = Evaluation(
                model,
                splits,
                image_processor,
                data_args,
                args.per_device_eval_batch_size,
                accelerator,
                args.disable_tqdm,
            )
        norms = batch_norms(model)
        if args.recalibrate_batch_norm and not norms:
            raise CAPError(f"{type(model).__name__} has no batch norm: leave --recalibrate_batch_norm out")
        recalibrate = bool(norms) if args.recalibrate_batch_norm is None else args.recalibrate_batch_norm
    steps = [steps_towards(sparsity, args.num_recomputations, start) for sparsity in sparsities]
    if args.dry_run:
        evaluated = len(splits["eval"]) + len(splits.get("bank", ())) if args.do_eval else 0
        collections = sum(len(each) for each in steps) if args.num_recomputations else 1
        counts = Counts(len(sparsities), collections, evaluated, recalibrate)
        print_plan(compressor, train_loader, data_args, heal_args, counts, args.plan_for)
        accelerator.end_training()
        return
    settings = {"model_name_or_path": model_args.model_name_or_path} | asdict(data_args) | config.to_dict()
    tracker = Tracker(accelerator, output.name, settings)
    watch = Watch(Recorder(args.report, args.command, accelerator, len(sparsities)), tracker, phases)
    dense = None
    if evaluation is not None:
        # Before anything is pruned: the model that is compared with is this one.
        with phases("evaluate dense"):
            dense = evaluation.measure_dense(model)
    watch.measured_dense(sparsity_dense, evaluation, dense)
    checkpointing = None
    if args.checkpoint_every is not None:
        checkpointing = Checkpointing(state_folder(args), args.checkpoint_every, args.resume)
    if args.num_recomputations:
        reports = prune_in_steps(compressor, train_loader, sparsities, args.num_recomputations, recalibrate)
    else:
        with phases("collect"):
            compressor.collect(train_loader, checkpointing)
        reports = compressor.prune_each(sparsities)
    facts: dict[str, object] = {"dense": dense, "sparsity_dense": sparsity_dense}
    facts |= {"left_alone": left_alone(model, compressor.targets)}
    facts["image_size"] = size_of(model, collate([calibration[0]]))
    results = []
    for sparsity, way in zip(sparsities, steps, strict=True):
        if healing is not None:
            healing.restore()
        with phases(f"prune {sparsity:g}"):
            report = next(reports)
        # Now it also says which loss the Fisher is made from.
        config = compressor.config
        facts |= describe(model_args, data_args, config, accelerator)
        if refits:
            with phases(f"refit {sparsity:g}"):
                report = compressor.refit(train_loader)
        layers = []
        if recalibrate:
            with phases(f"batch norm {sparsity:g}"):
                layers = compressor.recalibrate_batch_norm(train_loader)
        healed, stored = None, form
        if healing is not None:
            with phases(f"heal {sparsity:g}"):
                healed, stored = healing.heal(compressor, form)
        metrics = None
        if evaluation is not None:
            with phases(f"evaluate {sparsity:g}"):
                metrics = evaluation.measure(model)
        folder = output / checkpoint_name(sparsity)
        watch.measured(folder.name, compressor, evaluation, report, metrics)
        outcome: dict[str, object] = {"sparse": metrics, "pruning": report.to_dict(), "steps": way}
        outcome |= {"recalibrated_batch_norm": layers, "healing": healed}
        if accelerator.is_main_process:
            save_checkpoint(folder, model, config, facts | outcome, image_processor, companions=companions, form=stored)
        results.append({"checkpoint": folder.name} | outcome)
    if accelerator.is_main_process:
        write_json(output / "report.json", facts | {"results": results, "phases": phases.records})
        print(summary(dense, sparsity_dense, results))
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
    )
