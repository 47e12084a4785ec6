"""`cap-hf prune`: one collection, several sparsities, each evaluated and saved."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from cap_hf.checkpoints.atomic import write_json
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.collection.resources import Resources
from cap_hf.collection.state import Checkpointing
from cap_hf.commands.common import (
    DEFAULT_OUTPUT_DIR,
    ModelArguments,
    check_output,
    eval_dataset,
    load_all,
    parse,
    percent,
    table,
)
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig
from cap_hf.data.evaluation import evaluate_model
from cap_hf.data.images import DataArguments, ImageDataset, calibration_split, make_dataloader
from cap_hf.distributed.accelerator import make_accelerator
from cap_hf.errors import CAPError
from cap_hf.report import Phases, PruneReport, versions


@dataclass
class PruneArguments:
    """What to make of the checkpoint, and where it goes."""

    output_dir: str = field(default=DEFAULT_OUTPUT_DIR, metadata={"help": "Gets report.json and sparsity-*/."})
    sparsity: list[float] | None = field(
        default=None,
        metadata={"help": "Share of the target weights to be 0, in [0, 1); several give a checkpoint each."},
    )
    per_device_batch_size: int = field(default=64, metadata={"help": "Examples a step while gradients are collected."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples a step of evaluation."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate the dense model and each sparse one."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace checkpoints that are there."})
    checkpoint_every: int | None = field(
        default=None,
        metadata={"help": "Gradient samples between two saves of the collection's state, in OUTPUT_DIR-collection."},
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the state that a killed run has left."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    description = "Prune an image classifier with CAP, in one shot, to one or several sparsities."
    model_args, data_args, args, config, resources = parse(
        argv, "prune", description, ModelArguments, DataArguments, PruneArguments, CAPConfig, Resources
    )
    sparsities = check_sparsities(args.sparsity, config)
    output = Path(args.output_dir)
    folders = [output / f"sparsity-{sparsity:.12g}" for sparsity in sparsities]
    checkpointing = check_state(args)
    check_output(output, args.overwrite_output_dir or args.resume)
    if args.disable_tqdm:
        transformers_logging.disable_progress_bar()

    accelerator, phases = make_accelerator(), Phases()
    with phases("load"):
        model, image_processor, splits = load_all(
            model_args, data_args, config.seed, ["train", "eval"] if args.do_eval else ["train"]
        )
        compressor = CAPCompressor(model, config, accelerator, args.disable_tqdm, resources, len(sparsities))
        examples = calibration_split(splits["train"], config.num_grads * config.samples_per_grad, config.seed)
        calibration = ImageDataset(examples, image_processor, model.config, data_args)
        # Gradient samples do not straddle batches.
        group = config.samples_per_grad
        batch_size = max(1, args.per_device_batch_size // group) * group
        train_loader = make_dataloader(calibration, batch_size, data_args.dataloader_num_workers)
        evaluation = eval_dataset(splits, image_processor, model, data_args) if args.do_eval else None

    def evaluate(name: str) -> dict[str, float] | None:
        if evaluation is None:
            return None
        loader = make_dataloader(evaluation, args.per_device_eval_batch_size, data_args.dataloader_num_workers)
        with phases(name):
            return evaluate_model(model, accelerator.prepare(loader), accelerator, args.disable_tqdm)

    dense = evaluate("evaluate dense")
    with phases("collect"):
        compressor.collect(train_loader, checkpointing)
    results = []
    for sparsity, folder in zip(sparsities, folders, strict=True):
        with phases(f"prune {sparsity:g}"):
            report = compressor.prune(sparsity)
        metrics = evaluate(f"evaluate {sparsity:g}")
        facts = describe(model_args, data_args, config, accelerator) | {"dense": dense, "sparse": metrics}
        if accelerator.is_main_process:
            save_checkpoint(folder, model, config, facts | {"pruning": report.to_dict()}, image_processor)
        results.append((folder, report, metrics))
    if accelerator.is_main_process:
        full = describe(model_args, data_args, config, accelerator) | {
            "dense": dense,
            "results": [
                {"checkpoint": folder.name, "sparse": metrics, "pruning": report.to_dict()}
                for folder, report, metrics in results
            ],
            "phases": phases.records,
        }
        write_json(output / "report.json", full)
        print(summary(dense, results))
        print(f"\n{len(results)} checkpoint(s) and report.json are in {output}")
    compressor.discard_state()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def check_state(args: PruneArguments) -> Checkpointing | None:
    """Where the collection's state goes, if it is to be kept.

    Raises:
        CAPError: a state is there and nothing is said of it, or the other way round.
    """
    folder = Path(args.output_dir).with_name(f"{Path(args.output_dir).name}-collection")
    if args.checkpoint_every is None:
        if args.resume:
            raise CAPError("--resume goes with --checkpoint_every, as the run that was killed had it")
        return None
    if args.checkpoint_every < 1:
        raise CAPError(f"checkpoint_every={args.checkpoint_every} must be at least 1")
    if args.resume and not folder.is_dir():
        raise CAPError(f"--resume: {folder} is not there, so nothing was saved: leave --resume out")
    return Checkpointing(folder, args.checkpoint_every, args.resume)


def check_sparsities(sparsities: list[float] | None, config: CAPConfig) -> list[float]:
    """The sparsities in rising order, before anything slow begins.

    Raises:
        CAPError: none is given, one is out of range, or they contradict an N:M allocation.
    """
    pattern = config.pattern
    if pattern is not None:
        if sparsities and any(abs(sparsity - pattern.sparsity) > 1e-9 for sparsity in sparsities):
            raise CAPError(f"--allocation {pattern} is sparsity {pattern.sparsity:g}: leave --sparsity out")
        return [pattern.sparsity]
    if not sparsities:
        raise CAPError("say how sparse: --sparsity 0.5 0.75 0.9")
    for sparsity in sparsities:
        if not 0 <= round(sparsity, 12) < 1:
            raise CAPError(f"sparsity {sparsity:g} is not in [0, 1)")
    # Closer than this, two would share a folder.
    return sorted({round(sparsity, 12) for sparsity in sparsities})


def describe(
    model_args: ModelArguments, data_args: DataArguments, config: CAPConfig, accelerator: Accelerator
) -> dict[str, object]:
    """What a report says of the run; never a token."""
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


def summary(dense: dict | None, results: list[tuple[Path, PruneReport, dict | None]]) -> str:
    """One line a model: sparsity, accuracy, the drop against the dense model."""
    header = ["model", "sparsity %", "top-1 %", "top-5 %", "loss", "drop"]
    rows = []
    for name, sparsity, metrics in (
        ("dense", None, dense),
        *((folder.name, report.sparsity, metrics) for folder, report, metrics in results),
    ):
        drop = None if dense is None or metrics is None or metrics is dense else dense["top1"] - metrics["top1"]
        metrics = metrics or {}
        loss = f"{metrics['loss']:.4f}" if "loss" in metrics else "-"
        rows.append(
            [name, percent(sparsity), percent(metrics.get("top1")), percent(metrics.get("top5")), loss, percent(drop)]
        )
    return table(header, rows)
