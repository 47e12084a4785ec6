"""`cap-hf finetune`: recovers a sparse checkpoint, or prunes it gradually, with every zero held."""

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.collection.resources import Resources
from cap_hf.commands.arguments import ModelArguments, ProbeArguments, check_output, parse
from cap_hf.commands.common import hide_bars, image_dataset, load_all, load_companions, load_image_processor, load_model
from cap_hf.commands.evaluation import Evaluation
from cap_hf.commands.tables import percent, results_table
from cap_hf.config import CONFIG_NAME, CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import collate
from cap_hf.errors import CAPError, reason
from cap_hf.masks import describe_masks
from cap_hf.outputs import check_task, label_names
from cap_hf.recovery.distillation import check_pixels, without_head
from cap_hf.recovery.gradual import GradualPruner
from cap_hf.recovery.mask_holder import model_sparsity
from cap_hf.recovery.metrics import check_metric, compute_metrics, first_logits
from cap_hf.recovery.precision import full_precision
from cap_hf.recovery.resume import checkpoint_folders, choose_checkpoint, remove_checkpoints
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.report import Phases, versions
from cap_hf.targets import find_targets
from cap_hf.towers import is_classifier

logger = logging.getLogger(__name__)


@dataclass
class FinetuneArguments:
    """What to learn from, and what may be replaced."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Hub id or a folder with a dense model to learn from."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a checkpoint that is there."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, data_args, args, training_args, probe_args, config, resources = read_arguments(argv)
    output = training_args.folder
    resume = prepare_output(training_args, args.overwrite_output_dir)
    if training_args.disable_tqdm:
        hide_bars()

    phases = Phases()
    with phases("load"):
        needed = ["train", "eval"] if training_args.do_eval else ["train"]
        bank_size = probe_args.knn_bank_size if training_args.do_eval else 0
        model, image_processor, splits = load_all(
            model_args, data_args, training_args.seed, needed, bank_size=bank_size
        )
        companions = load_companions(model_args)
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
            pruner = GradualPruner.from_split(
                splits["train"], image_processor, model, data_args, config, batch_size, quiet, resources
            )
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

    dense = evaluate("evaluate dense", teacher)
    sparse, sparsity_before = evaluate("evaluate sparse", model), model_sparsity(model)
    if resume is None and trainer.is_world_process_zero():
        remove_checkpoints(training_args.folder)
    with phases("train"):
        outcome = trainer.train(resume_from_checkpoint=resume)
    recovered = evaluate("evaluate recovered", model)
    report = {
        "model_name_or_path": model_args.model_name_or_path,
        "teacher_model_name_or_path": args.teacher_model_name_or_path,
        "data": asdict(data_args),
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
        save_checkpoint(output, model, pruned_with, report, image_processor, companions=companions)
        print(summary(report))
        print(f"\nThe recovered checkpoint and report.json are in {output}")
    trainer.accelerator.wait_for_everyone()
    if training_args.push_to_hub:
        with one_line(f"the checkpoint is in {output}, but was not pushed: "):
            trainer.push_to_hub()
    trainer.accelerator.end_training()


def read_arguments(argv: list[str]) -> tuple:
    """Return the dataclasses of the command, with what two of them have in common taken from the training's.

    Raises:
        CAPError: an argument is wrong, or says how to prune in a run that does not.
    """
    description = "Finetune a sparse vision model with its zeros held; with a schedule, prune it gradually."
    with one_line():
        model_args, data_args, args, training_args, probe_args, config, resources = parse(
            argv,
            "finetune",
            description,
            ModelArguments,
            without_fields(DataArguments, "dataloader_num_workers"),
            FinetuneArguments,
            SparseTrainingArguments,
            ProbeArguments,
            without_fields(CAPConfig, "seed"),
            Resources,
        )
    data_args = DataArguments(**asdict(data_args), dataloader_num_workers=training_args.dataloader_num_workers)
    config = CAPConfig(**asdict(config), seed=training_args.seed)
    if training_args.schedule is None:
        usual = CAPConfig(seed=config.seed).to_dict()
        unused = [f"--{name}" for name, value in config.to_dict().items() if value != usual[name]]
        if unused:
            raise CAPError(f"{', '.join(unused)} without --sparsity_schedule prunes nothing: give one, such as 0.9")
    return model_args, data_args, args, training_args, probe_args, config, resources


@contextmanager
def one_line(prefix: str = "") -> Iterator[None]:
    """Turn what the Trainer says of its arguments into a CAPError: a package that is missing, a Hub that refuses."""
    try:
        yield
    except CAPError:
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CAPError(f"{prefix}{reason(error)}") from error


def without_fields(kind: type, *names: str) -> type:
    """Return a dataclass with a dataclass's fields except some, for a parser where another one has those."""
    kept = [(each.name, each.type, copy.copy(each)) for each in fields(kind) if each.name not in names]
    return make_dataclass(kind.__name__, kept, namespace={"__doc__": kind.__doc__})


def prepare_output(args: SparseTrainingArguments, overwrite: bool) -> str | None:
    """Send the Trainer's own checkpoints to a folder beside `output_dir`, which is written once and whole.

    Returns:
        The checkpoint to resume from, or None.

    Raises:
        CAPError: something is there already and may not be replaced, or there is nothing to resume from.
    """
    output = args.folder
    check_output(output, overwrite)
    if args.hub_model_id is None:
        args.hub_model_id = output.name
    output = Path(os.path.abspath(output))
    args.output_dir = str(output.with_name(f"{output.name}-training"))
    # Pinning memory is for copies to an accelerator.
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
    resume = choose_checkpoint(args.folder, args.resume_from_checkpoint)
    if resume is None and checkpoint_folders(args.folder) and not overwrite:
        raise CAPError(
            f"{args.output_dir} has checkpoints of an earlier run: go on with --resume_from_checkpoint last or "
            "start again with --overwrite_output_dir"
        )
    return resume


def load_teacher(name: str | None, model_args: ModelArguments, image_processor: Any) -> PreTrainedModel | None:
    """Return the dense model to learn from, if one is named.

    Raises:
        CAPError: it cannot be loaded, or was trained on pixels that are normalised otherwise.
    """
    if name is None:
        return None
    teacher_args = replace(model_args, model_name_or_path=name, model_revision="main")
    teacher = load_model(teacher_args)
    try:
        own = load_image_processor(teacher_args)
    except CAPError as error:
        logger.warning("The teacher is given the student's pixels, as %s", error)
        return teacher
    check_pixels(image_processor, own)
    return teacher


def student_config(model_args: ModelArguments) -> CAPConfig | None:
    """Return the CAPConfig that the student was pruned with, if its checkpoint has one.

    Raises:
        CAPError: it has one that cannot be read.
    """
    found = cached_file(
        model_args.model_name_or_path,
        CONFIG_NAME,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        token=model_args.token,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return None
    try:
        return CAPConfig.load(Path(found).parent)
    except (OSError, TypeError, ValueError) as error:
        raise CAPError(f"{CONFIG_NAME} of {model_args.model_name_or_path} cannot be read: {reason(error)}") from error


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
