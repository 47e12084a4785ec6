"""`cap-hf finetune`: recovers a sparse checkpoint, or prunes it gradually, with every zero held."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cap_hf.checkpoints.atomic import check_place
from cap_hf.checkpoints.form import fitting_form, round_weights
from cap_hf.checkpoints.places import real_path
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.collection.resources import Resources
from cap_hf.commands.arguments import ModelArguments, ProbeArguments, beside, check_output
from cap_hf.commands.common import hide_bars, image_dataset, load_all, load_companions, load_form
from cap_hf.commands.evaluation import Evaluation
from cap_hf.commands.pushing import open_push, push
from cap_hf.commands.recording import Recorder
from cap_hf.commands.tables import percent, results_table
from cap_hf.commands.teaching import load_teacher, student_config
from cap_hf.commands.training import FinetuneArguments, one_line, read_arguments
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.inference.example import size_of
from cap_hf.masks import describe_masks
from cap_hf.models import full_precision
from cap_hf.outputs import check_task, label_names
from cap_hf.recovery.distillation import without_head
from cap_hf.recovery.gradual import GradualPruner
from cap_hf.recovery.mask_holder import model_sparsity
from cap_hf.recovery.metrics import check_metric, compute_metrics, first_logits
from cap_hf.recovery.resume import checkpoint_folders, choose_checkpoint, remove_checkpoints
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.report import Phases, now, versions
from cap_hf.targets import find_targets
from cap_hf.towers import is_classifier


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, data_args, args, training_args, probe_args, config, resources = read_arguments(argv)
    output = training_args.folder
    resume = prepare_output(training_args, args.overwrite_output_dir)
    repo_id = open_push(training_args)
    if training_args.disable_tqdm:
        hide_bars()
    with without_empty_folder(training_args.folder):
        finetune(model_args, data_args, args, training_args, probe_args, config, resources, output, resume, repo_id)


def finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: FinetuneArguments,
    training_args: SparseTrainingArguments,
    probe_args: ProbeArguments,
    config: CAPConfig,
    resources: Resources,
    output: Path,
    resume: str | None,
    repo_id: str | None,
) -> None:
    """Do the work, once nothing is wrong with the arguments: load, train, evaluate, save, push.

    Args:
        output: gets the recovered checkpoint, whole; `training_args` has the Trainer's own folder.
        resume: the Trainer's checkpoint to go on from.
        repo_id: where to push to.
    """
    phases, started = Phases(), now()
    with phases("load"):
        needed = ["train", "eval"] if training_args.do_eval else ["train"]
        bank_size = probe_args.knn_bank_size if training_args.do_eval else 0
        model, image_processor, splits = load_all(
            model_args, data_args, training_args.seed, needed, bank_size=bank_size
        )
        companions, form = load_companions(model_args), load_form(model_args, model)
        # What a recovered checkpoint was pruned with is what the checkpoint that it is made from was pruned with.
        pruned_with = config if training_args.schedule else student_config(model_args)
        teacher = load_teacher(args.teacher_model_name_or_path, model_args, image_processor)
        has_head = is_classifier(model)
        if has_head:
            check_task(model, "this command is", "SparseTrainer trains it in Python, with its own loss")
        if not has_head:
            if teacher is None:
                raise CAPError(
                    f"{type(model).__name__} has no head to learn labels with: name the dense model, whose features it "
                    "learns, with --teacher_model_name_or_path"
                )
            teacher = without_head(teacher)
        train_dataset = image_dataset(splits["train"], image_processor, model, data_args)
        eval_dataset = image_dataset(splits["eval"], image_processor, model, data_args) if "eval" in splits else None
        if teacher is None:
            train_dataset.need_labels()
            if eval_dataset is not None:
                eval_dataset.need_labels("leave the evaluation out with --do_eval false")
        # Without labels there is the loss alone.
        labelled = has_head and (eval_dataset is None or eval_dataset.labelled)
        check_metric(training_args.metric_for_best_model, len(label_names(model.config)) if labelled else 0)
        pruner = None
        if training_args.schedule:
            batch_size, quiet = training_args.per_device_train_batch_size, bool(training_args.disable_tqdm)
            how = (config, batch_size, quiet, resources, training_args.device)
            pruner = GradualPruner.from_split(splits["train"], image_processor, model, data_args, *how)
        with one_line():
            trainer = SparseTrainer(
                model,
                training_args,
                teacher=teacher,
                prune=pruner,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                data_collator=collate,
                processing_class=image_processor,
                compute_metrics=compute_metrics if labelled else None,
                preprocess_logits_for_metrics=first_logits,
            )
        evaluation = None
        if training_args.do_eval:
            evaluation = Evaluation(
                model,
                splits,
                image_processor,
                data_args,
                training_args.per_device_eval_batch_size,
                trainer.accelerator,
                bool(training_args.disable_tqdm),
            )

    def evaluate(name: str, measured: PreTrainedModel | None) -> dict[str, float] | None:
        if evaluation is None or measured is None:
            return None
        # As from_pretrained will load it, whatever precision it was trained in.
        with phases(name), full_precision(measured):
            return evaluation.measure_dense(measured) if measured is teacher else evaluation.measure(measured)

    recorder = Recorder(args.report, args.command, trainer.accelerator)
    dense = evaluate("evaluate dense", teacher)
    if dense is not None:
        recorder.measured_dense(evaluation)
    sparse, sparsity_before = evaluate("evaluate sparse", model), model_sparsity(model)
    if resume is None and trainer.is_world_process_zero():
        remove_checkpoints(training_args.folder)
    with phases("train"):
        outcome = trainer.train(resume_from_checkpoint=resume)
    # What is measured from here on is what will be stored, and hours of training are.
    form = fitting_form(form, model)
    round_weights(model, form.dtype)
    recovered = evaluate("evaluate recovered", model)
    recorder.measured("recovered", evaluation, model)
    report = {
        "started": started,
        "model_name_or_path": model_args.model_name_or_path,
        "model_revision": model_args.model_revision,
        "teacher_model_name_or_path": args.teacher_model_name_or_path,
        "preset": args.preset,
        "data": asdict(data_args),
        "image_size": size_of(model, collate([train_dataset[0]])),
        "config": config.to_dict() if training_args.schedule else None,
        "training_arguments": training_args.changed(),
        "num_processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
        "versions": versions(),
        "dense": dense,
        "sparse": sparse,
        "recovered": recovered,
        "sparsity_dense": None if teacher is None else model_sparsity(teacher),
        "sparsity_before": sparsity_before,
        "sparsity": model_sparsity(model),
        "layers": describe_masks(find_targets(model)),
        "training": outcome.metrics | {"steps": outcome.global_step},
        "log_history": trainer.state.log_history,
        "phases": phases.records,
    }
    if trainer.is_world_process_zero():
        trainer.masks.verify()
        save_checkpoint(output, model, pruned_with, report, image_processor, companions=companions, form=form)
        print(summary(report))
        print(f"\nThe recovered checkpoint and report.json are in {output}")
        recorder.write(output)
        if repo_id is not None:
            print(f"{repo_id} was pushed: {push(output, repo_id, training_args, model_args.trust_remote_code)}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@contextmanager
def without_empty_folder(folder: Path) -> Iterator[None]:
    """Remove a folder in the end if it was not there before, and holds nothing: the Trainer makes it anyway."""
    there = folder.exists()
    try:
        yield
    finally:
        if not there:
            with suppress(OSError):
                folder.rmdir()


def prepare_output(args: SparseTrainingArguments, overwrite: bool) -> str | None:
    """Send the Trainer's own checkpoints to a folder beside `output_dir`, which is written once and whole.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        CAPError: something is there already and may not be replaced, or there is nothing to resume from.
    """
    output, training = args.folder, beside(args.folder, "training")
    check_output(output, overwrite, training)
    # Now, and not only after the training.
    check_place(output)
    if args.hub_model_id is None:
        args.hub_model_id = real_path(output).name
    args.output_dir = str(training)
    # Pinning memory is for copies to an accelerator.
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
    resume = choose_checkpoint(args.folder, args.resume_from_checkpoint)
    if resume is None and checkpoint_folders(args.folder) and not overwrite:
        raise CAPError(
            f"{args.output_dir} has checkpoints of an earlier run: go on with --resume_from_checkpoint last or "
            "start again with --overwrite_output_dir"
        )
    return resume


def summary(report: dict) -> str:
    """Return the table of the models that were evaluated, or one line if none was."""
    rows = [
        (name, report[sparsity], report[name])
        for name, sparsity in (("dense", "sparsity_dense"), ("sparse", "sparsity_before"), ("recovered", "sparsity"))
        if report[name] is not None
    ]
    if not rows:
        return f"Recovered at {percent(report['sparsity'])} % sparsity, not evaluated"
    return results_table(rows, report["dense"])
