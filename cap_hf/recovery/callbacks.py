"""What SparseTrainer adds to a run, each as a callback: masks, pruning steps, the weight average."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cap_hf.recovery.averaging import WeightAverage
from cap_hf.recovery.mask_holder import MaskHolder
from cap_hf.recovery.schedules import SparsitySchedule
from cap_hf.report import PruneReport

# Prunes a model in place, to a sparsity, on the processes of an accelerator, the same on each.
PruneStep = Callable[[PreTrainedModel, float, Accelerator], PruneReport]


class MaskCallback(TrainerCallback):
    """Holds the masks from the beginning of training, after a checkpoint was loaded, to its end."""

    def __init__(self, holder: MaskHolder) -> None:
        self.holder = holder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        # A checkpoint to resume from has the zeros of the model it began with, and those of the steps since.
        self.holder.verify()
        self.holder.take()
        self.holder.attach(optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.holder.verify()
        self.holder.detach()


class PruningCallback(TrainerCallback):
    """Prunes at the beginning of the optimizer steps of a schedule.

    A checkpoint is written at the end of a step, never between a pruning step and the optimizer step that follows
    it, so the number of that optimizer step alone says what a resumed run has behind it.
    """

    def __init__(
        self,
        holder: MaskHolder,
        schedule: SparsitySchedule,
        prune: PruneStep,
        accelerator: Accelerator,
        average: WeightAverage | None,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        self.holder, self.schedule, self.prune, self.average = holder, schedule, prune, average
        self.accelerator, self.log = accelerator, log
        self.steps: dict[int, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps = self.schedule.at_steps(state.max_steps, args.num_train_epochs)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        if state.global_step not in self.steps:
            return
        # A collection is the same whenever it happens, and training draws the same numbers with it and without.
        with isolated_random_state(self.accelerator.device), full_precision(model):
            report = self.prune(model, self.steps[state.global_step], self.accelerator)
        self.holder.verify()
        self.holder.take()
        self.holder.clear_state(optimizer)
        if self.average is not None:
            self.average.restart()
        # The best checkpoint so far is denser than what this run is to end with.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self.log({"sparsity": report.sparsity})


class AveragingCallback(TrainerCallback):
    """Updates the average after every optimizer step and gives the model its weights when training ends."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.average.update(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self.average.started:
            self.average.swap(model)
            self.average.restart()


@contextmanager
def isolated_random_state(device: torch.device) -> Iterator[None]:
    """What happens inside draws nothing from torch's global generators."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Inside the context the model runs in its own dtype: without the autocast that accelerate put on its `forward`.

    Gradients of single examples are too small for float16.
    """
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
