"""Heals a model that was pruned: a few hundred steps towards the dense one, on images alone, with its masks held."""

import logging
from collections.abc import Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from cap_hf.collection.progress import Phase, Progress
from cap_hf.data.images import collate
from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.errors import CAPError
from cap_hf.outputs import check_task
from cap_hf.recovery.distillation import has_states
from cap_hf.recovery.inputs import collated, trainable
from cap_hf.recovery.presets import HEAL
from cap_hf.recovery.tower import Tower
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.towers import is_classifier

logger = logging.getLogger(__name__)

# Steps whose mean is the loss at the end: one batch says little.
LAST = 10


@dataclass
class HealReport:
    """What a healing did.

    Attributes:
        steps: of the optimizer.
        batch_size: images per step and process.
        images: how many different ones were seen.
        learning_rate: at its peak.
        bf16: whether it was computed in mixed precision.
        loss_start: of the first step, before any weight has moved.
        loss_end: mean of the last 10 steps.
    """

    steps: int
    batch_size: int
    images: int
    learning_rate: float
    bf16: bool
    loss_start: float
    loss_end: float

    def to_dict(self) -> dict[str, int | float | bool]:
        """Return it for JSON."""
        return asdict(self)


class Bar(TrainerCallback):
    """Counts steps on a bar."""

    def __init__(self, advance: Phase) -> None:
        self.advance = advance

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(1)


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    steps: int = HEAL["max_steps"],
    batch_size: int = HEAL["per_device_train_batch_size"],
    learning_rate: float = HEAL["learning_rate"],
    bf16: bool = False,
    seed: int = 42,
    num_workers: int | None = None,
    disable_tqdm: bool = False,
) -> HealReport:
    """Train a sparse model, in place and with every zero held, towards the hidden states and logits of the dense one.

    It is what `cap-hf finetune --preset heal` does, with the same numbers (`cap_hf.recovery.presets`), where nothing
    is to be kept of the training but the model. A model without a head learns features in the place of logits; one
    that gives no hidden states learns without them. Embeddings and head stay as they are (see `frozen_outside`).

    Args:
        model: sparse, as `SparseTrainer` takes it; it is trained on the device where it is, or with several processes
            on that of each.
        teacher: the dense model, another object; frozen.
        dataset: of images, such as an ImageDataset; labels are not looked at.
        steps: of the optimizer; fewer images than these take are seen several times.
        batch_size: images per step and process.
        learning_rate: at its peak.
        bf16: compute in mixed precision, and the teacher in bfloat16; weights stay in float32.
        seed: of the order of the images and of flips; the same one gives the same weights.
        num_workers: processes that read images, as of `cap_hf.data.workers.num_workers`.
        disable_tqdm: no progress bar.

    Raises:
        CAPError: there is no step; as `SparseTrainer`, or the model is a classifier that does not pick one label of
            several.
    """
    if steps < 1:
        # The Trainer would take a number below 0 for none, and train 3 epochs.
        raise CAPError(f"steps={steps} heals nothing: it must be at least 1")
    model = trainable(model)
    training, forward = model.training, model.__dict__.get("forward")
    try:
        return _heal(model, teacher, dataset, steps, batch_size, learning_rate, bf16, seed, num_workers, disable_tqdm)
    finally:
        model.train(training)
        # Where the launcher asks for mixed precision, the Trainer leaves autocast on what it has trained.
        if forward is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = forward


def check_healing(model: PreTrainedModel, teacher: PreTrainedModel, dataset: Dataset, bf16: bool = False) -> None:
    """Raise the CAPError of `heal` about what does not fit together, before any work."""
    with TemporaryFolder() as folder:
        make_trainer(trainable(model), teacher, dataset, folder, bf16=bf16, teacher_bf16=bf16)


def _heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset,
    steps: int,
    batch_size: int,
    learning_rate: float,
    bf16: bool,
    seed: int,
    num_workers: int | None,
    disable_tqdm: bool,
) -> HealReport:
    with TemporaryFolder() as folder:
        trainer = make_trainer(
            model,
            teacher,
            dataset,
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            # Few steps would else never come to that rate.
            warmup_steps=min(HEAL["warmup_steps"], steps // 10),
            bf16=bf16,
            teacher_bf16=bf16,
            seed=seed,
            dataloader_num_workers=num_workers,
        )
        progress = Progress(disable_tqdm or not trainer.is_world_process_zero())
        trainer.add_callback(Bar(progress.phase("healing", "step", steps)))
        try:
            trainer.train()
            progress.end_phase()
        finally:
            progress.close()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seen = steps * batch_size * trainer.args.world_size
    return HealReport(
        steps=steps,
        batch_size=batch_size,
        images=min(seen, len(dataset)) if isinstance(dataset, Sized) else seen,
        learning_rate=learning_rate,
        bf16=bf16,
        loss_start=losses[0],
        loss_end=sum(losses[-LAST:]) / len(losses[-LAST:]),
    )


def make_trainer(
    model: PreTrainedModel, teacher: PreTrainedModel, dataset: Dataset, folder: str, **changes: Any
) -> SparseTrainer:
    """Return a trainer that heals, and says and keeps nothing.

    Args:
        model: sparse.
        teacher: dense.
        dataset: of images.
        folder: for the Trainer, which writes nothing into it.
        changes: fields of SparseTrainingArguments that differ from the preset's.

    Raises:
        CAPError: as `heal`.
    """
    if is_classifier(model):
        check_task(model, "healing is", "leave it out (--heal_steps 0)")
    changes |= {} if gives_states(model, dataset) else {"hidden_state_weight": 0.0}
    own = {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": model.device.type == "cpu"}
    args = SparseTrainingArguments(output_dir=folder, **HEAL | own | changes)
    # Pruning takes one device per process, where the Trainer would share batches out among all that it sees.
    args._n_gpu = min(args.n_gpu, 1)
    trainer = SparseTrainer(model, args, teacher=teacher, train_dataset=dataset, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


def gives_states(model: PreTrainedModel, dataset: Any) -> bool:
    """Return whether a model gives its hidden states, found out on one image; a line says if it does not."""
    batch = collated(collate, [dataset[0]])
    inputs = {name: torch.as_tensor(each) for name, each in batch.items() if name != "labels"}
    found = has_states(Tower(model), inputs)
    if not found:
        logger.warning("%s gives no hidden states: it learns without them.", type(model).__name__)
    return found
