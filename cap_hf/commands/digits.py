"""The demo's models: a small ViT of the embedded digits is trained, and a sparse one recovered."""

from pathlib import Path
from typing import Any

import datasets
import torch
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

from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset, collate
from cap_hf.errors import CAPError
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments

# What the dense training and the recovery have in common: a short, silent run without checkpoints.
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def train_dense(folder: Path, split: datasets.Dataset, data_args: DataArguments, epochs: int, seed: int) -> None:
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
        num_train_epochs=epochs,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.05,
        seed=seed,
        **TRAINING,
    )
    dataset = ImageDataset(split, image_processor, config, data_args)
    trainer = Trainer(model=model, args=training, train_dataset=dataset, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    save_checkpoint(folder, model, image_processor=image_processor)


def recover(
    output: Path,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: ImageDataset,
    epochs: int,
    seed: int,
) -> None:
    """Finetune a sparse model for a few epochs, with its zeros held, to predict and to see what the teacher does."""
    training = SparseTrainingArguments(
        output_dir=str(output / "trainer"),
        num_train_epochs=epochs,
        hidden_state_weight=1.0,
        seed=seed,
        **TRAINING,
    )
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
