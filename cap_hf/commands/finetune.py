"""`cap-hf finetune`: recovers a sparse checkpoint, or prunes it gradually, with every zero held."""

import copy
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path

import torch
from transformers import EvalPrediction, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.collection.resources import Resources
from cap_hf.commands.common import (
    ModelArguments,
    check_output,
    eval_dataset,
    load_all,
    load_image_processor,
    load_model,
    parse,
    percent,
    table,
)
from cap_hf.config import CONFIG_NAME, CAPConfig
from cap_hf.data.evaluation import ImageClassificationMetric, evaluate_model
from cap_hf.data.images import DataArguments, ImageDataset, calibration_split, collate, make_dataloader
from cap_hf.errors import CAPError
from cap_hf.masks import describe_masks
from cap_hf.recovery.augmentation import pixel_statistics
from cap_hf.recovery.callbacks import full_precision
from cap_hf.recovery.gradual import GradualPruner
from cap_hf.recovery.trainer import SparseTrainer, model_sparsity
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.report import Phases, versions
from cap_hf.targets import find_targets


@dataclass
class FinetuneArguments:
    """What to learn from, and what may be replaced."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Hub id or a folder with a dense model to learn from."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a checkpoint that is there."})


def without_fields(kind: type, *names: str) -> type:
    """A dataclass with a dataclass's fields except some, for a parser where another one has those."""
    kept = [(each.name, each.type, copy.copy(each)) for each in fields(kind) if each.name not in names]
    return make_dataclass(kind.__name__, kept, namespace={"__doc__": kind.__doc__})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    description = "Finetune a sparse image classifier with its zeros held; with a schedule, prune it gradually."
    model_args, data_args, args, training_args, config, resources = parse(
        argv,
        "finetune",
        description,
        ModelArguments,
        without_fields(DataArguments, "dataloader_num_workers"),
        FinetuneArguments,
        SparseTrainingArguments,
        without_fields(CAPConfig, "seed"),
        Resources,
    )
    data_args = DataArguments(**asdict(data_args), dataloader_num_workers=training_args.dataloader_num_workers)
    config = CAPConfig(**asdict(config), seed=training_args.seed)
    output, resume = Path(training_args.output_dir), prepare_output(training_args, args.overwrite_output_dir)
    check_pattern(training_args, config)
    if training_args.disable_tqdm:
        transformers_logging.disable_progress_bar()

    phases = Phases()
    with phases("load"):
        model, image_processor, splits = load_all(model_args, data_args, training_args.seed)
        teacher = load_teacher(args.teacher_model_name_or_path, model_args, image_processor)
        evaluation = eval_dataset(splits, image_processor, model, data_args) if training_args.do_eval else None
        trainer = SparseTrainer(
            model,
            training_args,
            teacher=teacher,
            prune=make_pruner(splits, image_processor, model, data_args, config, training_args, resources),
            train_dataset=ImageDataset(splits["train"], image_processor, model.config, data_args),
            eval_dataset=evaluation,
            data_collator=collate,
            processing_class=image_processor,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=first_logits,
        )

    def evaluate(name: str, measured: PreTrainedModel | None) -> dict[str, float] | None:
        if evaluation is None or measured is None:
            return None
        loader = make_dataloader(
            evaluation, training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
        )
        # As from_pretrained will load it, whatever precision it was trained in.
        with phases(name), full_precision(measured):
            accelerator = trainer.accelerator
            return evaluate_model(measured, accelerator.prepare(loader), accelerator, training_args.disable_tqdm)

    dense = evaluate("evaluate dense", teacher)
    sparse, sparsity_before = evaluate("evaluate sparse", model), model_sparsity(model)
    with phases("train"):
        outcome = trainer.train(resume_from_checkpoint=resume)
    recovered = evaluate("evaluate recovered", model)
    report = {
        "model_name_or_path": model_args.model_name_or_path,
        "teacher_model_name_or_path": args.teacher_model_name_or_path,
        "data": asdict(data_args),
        "config": config.to_dict() if training_args.schedule else None,
        "training_arguments": recovery_arguments(training_args),
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
        own_config = config if training_args.schedule else student_config(model_args)
        save_checkpoint(output, model, own_config, report, image_processor)
        print(summary(report))
        print(f"\nThe recovered checkpoint and report.json are in {output}")
    trainer.accelerator.wait_for_everyone()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


def prepare_output(args: SparseTrainingArguments, overwrite: bool) -> str | bool | None:
    """Send the Trainer's own checkpoints to a folder beside `output_dir`, which is written once and whole.

    Returns:
        What to resume from: a folder, True for the last whole checkpoint, or None.

    Raises:
        CAPError: something is there already and may not be replaced.
    """
    output = Path(args.output_dir)
    check_output(output, overwrite)
    if args.hub_model_id is None:
        args.hub_model_id = output.name
    args.output_dir = str(output.with_name(f"{output.name}-training"))
    # Pinning memory is for copies to an accelerator.
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.cuda.is_available()
    resume = args.resume_from_checkpoint
    if not resume or str(resume).lower() == "false":
        if any(Path(args.output_dir).glob("checkpoint-*")) and not overwrite:
            raise CAPError(
                f"{args.output_dir} has checkpoints of an earlier run: go on with --resume_from_checkpoint last or "
                "start again with --overwrite_output_dir"
            )
        return None
    if str(resume).lower() in ("true", "last"):
        return True
    if not (Path(resume) / "trainer_state.json").is_file():
        raise CAPError(f"--resume_from_checkpoint {resume} is not a whole checkpoint: name one, or use last")
    return str(resume)


def check_pattern(args: SparseTrainingArguments, config: CAPConfig) -> None:
    """Raise a CAPError if an N:M allocation and the schedule ask for different sparsities."""
    if args.schedule is None or config.pattern is None:
        return
    if [sparsity for _, sparsity in args.schedule.steps] != [config.pattern.sparsity]:
        raise CAPError(
            f"--allocation {config.pattern} is sparsity {config.pattern.sparsity:g} in one step: "
            f"use --sparsity_schedule {config.pattern.sparsity:g}"
        )


def load_teacher(name: str | None, model_args: ModelArguments, image_processor: object) -> PreTrainedModel | None:
    """The dense model to learn from, if one is named.

    Raises:
        CAPError: it cannot be loaded, or was trained on pixels that are normalised otherwise.
    """
    if name is None:
        return None
    teacher_args = replace(model_args, model_name_or_path=name, model_revision="main")
    teacher = load_model(teacher_args)
    try:
        own = load_image_processor(teacher_args)
    except CAPError:
        # Without one of its own it is taken to want what the student wants.
        return teacher
    if pixel_statistics(own) != pixel_statistics(image_processor):
        raise CAPError(
            f"{name} normalises images to mean and std {pixel_statistics(own)}, the student to "
            f"{pixel_statistics(image_processor)}: choose a teacher with the student's image processor"
        )
    return teacher


def make_pruner(
    splits: dict,
    image_processor: object,
    model: PreTrainedModel,
    data_args: DataArguments,
    config: CAPConfig,
    args: SparseTrainingArguments,
    resources: Resources,
) -> GradualPruner | None:
    """What a pruning step of the schedule calls, on a calibration set that the seed fixes; None without a schedule."""
    if args.schedule is None:
        return None
    group = config.samples_per_grad
    examples = calibration_split(splits["train"], config.num_grads * group, config.seed)
    dataset = ImageDataset(examples, image_processor, model.config, data_args)
    batch_size = max(1, args.per_device_train_batch_size // group) * group
    loader = make_dataloader(dataset, batch_size, args.dataloader_num_workers)
    return GradualPruner(loader, config, bool(args.disable_tqdm), resources)


def student_config(model_args: ModelArguments) -> CAPConfig | None:
    """The CAPConfig that the student was pruned with, if its checkpoint has one."""
    found = cached_file(
        model_args.model_name_or_path,
        CONFIG_NAME,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else CAPConfig.load(Path(found).parent)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 for the Trainer's evaluations."""
    metric = ImageClassificationMetric(keep_in_memory=True)
    results = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
    return {name: results[name] for name in ("top1", "top5") if name in results}


def first_logits(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """The logits alone, of models that return more."""
    return logits[0] if isinstance(logits, tuple) else logits


def recovery_arguments(args: SparseTrainingArguments) -> dict[str, object]:
    """What a report says of the training: every argument that is not the default; never a token."""
    return {
        each.name: value
        for each in fields(args)
        if isinstance(value := getattr(args, each.name), (str, int, float, bool))
        and value != each.default
        and not each.name.endswith(("_dir", "_token"))
    }


def summary(report: dict) -> str:
    """One line a model: sparsity, accuracy, the drop against the dense model."""
    rows, dense = [], report["dense"]
    for name, key in (("dense", "sparsity_dense"), ("sparse", "sparsity_before"), ("recovered", "sparsity")):
        metrics = report[name]
        if metrics is None:
            continue
        drop = None if dense is None or name == "dense" else dense["top1"] - metrics["top1"]
        rows.append(
            [
                name,
                percent(report[key]),
                percent(metrics["top1"]),
                percent(metrics.get("top5")),
                f"{metrics['loss']:.4f}",
                percent(drop),
            ]
        )
    if not rows:
        return f"Recovered at {percent(report['sparsity'])} % sparsity, not evaluated"
    return table(["model", "sparsity %", "top-1 %", "top-5 %", "loss", "drop"], rows)
