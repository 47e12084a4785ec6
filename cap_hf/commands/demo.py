"""`cap-hf demo`: train, prune, recover on the embedded digits, in minutes on a CPU and without a network."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from cap_hf.checkpoints.atomic import write_json
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.commands.common import ModelArguments, load_image_processor, load_model, parse, percent, table
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig
from cap_hf.data.evaluation import evaluate_model
from cap_hf.data.images import DataArguments, ImageDataset, calibration_split, collate, load_splits, make_dataloader
from cap_hf.distributed.accelerator import make_accelerator
from cap_hf.errors import CAPError
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.report import Phases, versions

SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98)
SAVED = 0.9
METHODS = {
    "CAP": "cap",
    "OBS without correlations": "obs",
    "magnitude, global": "magnitude",
}
# What the dense training and the recovery have in common: a short, silent run without checkpoints.
TRAINING = {
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@dataclass
class DemoArguments:
    """Where the demo works."""

    output_dir: str = field(default="cap-hf-demo", metadata={"help": "Gets the dense and the pruned checkpoint."})
    num_train_epochs: int = field(default=30, metadata={"help": "Of the dense model."})
    num_recovery_epochs: int = field(default=3, metadata={"help": "Of the sparsest model, with the dense as teacher."})
    num_grads: int = field(default=512, metadata={"help": "Gradient samples of the Fisher."})
    seed: int = field(default=0, metadata={"help": "Of everything."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    (args,) = parse(argv, "demo", "Train, prune, recover, evaluate, save and load a small ViT.", DemoArguments)
    transformers_logging.disable_progress_bar()
    transformers.set_seed(args.seed)
    output, phases, accelerator = Path(args.output_dir), Phases(), make_accelerator()
    data_args = DataArguments()
    splits = load_splits(data_args, args.seed)
    dense_folder = output / "dense"
    if (dense_folder / "config.json").exists():
        print(f"Using the dense model of an earlier run in {dense_folder}")
    else:
        print("Training a small ViT on scikit-learn's digits ...", flush=True)
        with phases("train"):
            train_dense(dense_folder, splits, data_args, args)
    model_args = ModelArguments(model_name_or_path=str(dense_folder))
    image_processor = load_image_processor(model_args)
    dense = load_model(model_args)
    test = ImageDataset(splits["eval"], image_processor, dense.config, data_args)
    test_loader = make_dataloader(test, 64)
    with phases("evaluate dense"):
        dense_metrics = evaluate_model(dense, test_loader, accelerator)
    calibration = calibration_split(splits["train"], args.num_grads, args.seed)
    train_loader = make_dataloader(ImageDataset(calibration, image_processor, dense.config, data_args), 64)

    facts = {"data": asdict(data_args), "seed": args.seed, "dense": dense_metrics, "versions": versions()}
    accuracies: dict[str, list[float]] = {}
    reports = {}
    saved_folder = output / f"sparsity-{SAVED:g}"
    for label, method in METHODS.items():
        print(f"Pruning with {label} ...", flush=True)
        model = load_model(model_args)
        compressor = CAPCompressor(
            model, CAPConfig(method=method, num_grads=args.num_grads, seed=args.seed), accelerator
        )
        with phases(f"{method}: collect"):
            compressor.collect(train_loader)
        accuracies[label] = []
        for sparsity in SPARSITIES:
            with phases(f"{method}: prune {sparsity:g}"):
                report = compressor.prune(sparsity)
            metrics = evaluate_model(model, test_loader, accelerator)
            accuracies[label].append(metrics["top1"])
            reports[f"{method} {sparsity:g}"] = {"sparse": metrics, "pruning": report.to_dict()}
            if method == "cap" and sparsity == SAVED:
                sparse = facts | {"sparse": metrics, "pruning": report.to_dict()}
                save_checkpoint(saved_folder, model, compressor.config, sparse, image_processor)
                check_loaded(saved_folder, model, test_loader)
        if method == "cap":
            sparsest, config = model, compressor.config
    print(f"Recovering CAP's {100 * SPARSITIES[-1]:g} % model with the dense one as teacher ...", flush=True)
    with phases("recover"):
        recover(output, sparsest, dense, splits, image_processor, data_args, args)
    recovered = evaluate_model(sparsest, test_loader, accelerator)
    recovered_folder = output / f"recovered-{SPARSITIES[-1]:g}"
    save_checkpoint(recovered_folder, sparsest, config, facts | {"recovered": recovered}, image_processor)
    check_loaded(recovered_folder, sparsest, test_loader)
    reports[f"cap {SPARSITIES[-1]:g} recovered"] = {"recovered": recovered}
    write_json(output / "report.json", {"dense": dense_metrics, "results": reports, "phases": phases.records})
    header = ["top-1 % at sparsity", *(f"{100 * sparsity:g} %" for sparsity in SPARSITIES)]
    rows = [["dense", *([percent(dense_metrics["top1"])] * len(SPARSITIES))]]
    rows += [[label, *map(percent, values)] for label, values in accuracies.items()]
    rows.insert(2, ["CAP, recovered", *(["-"] * (len(SPARSITIES) - 1)), percent(recovered["top1"])])
    print(f"\n{table(header, rows)}\n")
    print(f"{saved_folder} and {recovered_folder} were loaded again with from_pretrained and predict the same.")


def train_dense(folder: Path, splits: dict, data_args: DataArguments, args: DemoArguments) -> None:
    """Train a ViT of 0.5 million weights from scratch with transformers' Trainer and save it."""
    # Without torchvision the PIL class is the one to name; the checkpoint names neither backend.
    from transformers import ViTImageProcessorPil as ViTImageProcessor

    names = [str(digit) for digit in range(10)]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = ViTForImageClassification(config)
    image_processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    )
    training = TrainingArguments(
        output_dir=str(folder.parent / "trainer"),
        num_train_epochs=args.num_train_epochs,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.05,
        seed=args.seed,
        **TRAINING,
    )
    dataset = ImageDataset(splits["train"], image_processor, config, data_args)
    trainer = Trainer(model=model, args=training, train_dataset=dataset, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    save_checkpoint(folder, model, image_processor=image_processor)


def recover(
    output: Path,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    splits: dict,
    image_processor: object,
    data_args: DataArguments,
    args: DemoArguments,
) -> None:
    """Finetune a sparse model for a few epochs, with its zeros held, to predict and to see what the teacher does."""
    training = SparseTrainingArguments(
        output_dir=str(output / "trainer"),
        num_train_epochs=args.num_recovery_epochs,
        hidden_state_weight=1.0,
        seed=args.seed,
        **TRAINING,
    )
    dataset = ImageDataset(splits["train"], image_processor, model.config, data_args)
    trainer = SparseTrainer(model, training, teacher=teacher, train_dataset=dataset, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def check_loaded(folder: Path, model: PreTrainedModel, loader: DataLoader) -> None:
    """Raise a CAPError unless plain `from_pretrained` gives a model that predicts what `model` does."""
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    batch = next(iter(loader))["pixel_values"]
    with torch.inference_mode():
        expected, found = (each.eval()(pixel_values=batch).logits for each in (model.cpu(), loaded))
    if not torch.equal(expected, found):
        raise CAPError(f"the checkpoint in {folder} predicts something else after loading")
