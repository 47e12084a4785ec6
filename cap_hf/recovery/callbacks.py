"""What SparseTrainer adds to a run, each as a callback: masks, pruning steps, the weight average."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cap_hf.errors import CAPError
from cap_hf.recovery.averaging import WeightAverage
from cap_hf.recovery.mask_holder import MaskHolder
from cap_hf.recovery.schedules import SparsitySchedule
from cap_hf.report import PruneReport

logger = logging.getLogger(__name__)

# Prunes a model in place, to a sparsity, on the processes of an accelerator, the same on each.
PruneStep = Callable[[PreTrainedModel, float, Accelerator], PruneReport]

# What a pruning step may miss its sparsity by: one weight of a small model is more than a rounding error.
TOLERANCE = 0.01


class MaskCallback(TrainerCallback):
    """Holds the masks from the beginning of training, after a checkpoint was loaded, to its end."""

    def __init__(self, holder: MaskHolder) -> None:
        self.holder = holder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint to resume from has the zeros of the model it began with, and those of the steps since.
        self.holder.verify()
        self.holder.take()
        self.holder.attach(kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.holder.verify()
        self.holder.detach()


class PruningCallback(TrainerCallback):
    """Prunes before the optimizer steps that a schedule names.

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
        done = pruning_steps(state)
        for step, sparsity in self.steps.items():
            if step < state.global_step and done.get(step, 0.0) < sparsity - TOLERANCE:
                raise CAPError(
                    f"the schedule prunes to {sparsity:g} at optimizer step {step}, and the run that made this "
                    f"checkpoint of step {state.global_step} did not: resume with that run's schedule and length"
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step not in self.steps:
            return
        model: PreTrainedModel = kwargs["model"]
        # A collection is the same whenever it happens, and training draws the same numbers with it and without.
        with isolated_random_state(self.accelerator.device):
            report = self.prune(model, self.steps[state.global_step], self.accelerator)
        self.holder.verify()
        self.holder.take()
        self.holder.clear_state(kwargs["optimizer"])
        if self.average is not None:
            self.average.restart()
        # The best checkpoint so far is denser than what this run is to end with.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self.log({"sparsity": report.sparsity})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        missed = sorted(set(self.steps) - set(pruning_steps(state)))
        if missed:
            logger.warning(
                "Training ended at optimizer step %d, before the pruning step to sparsity %g at step %d.",
                state.global_step,
                self.steps[missed[-1]],
                missed[-1],
            )


def pruning_steps(state: TrainerState) -> dict[int, float]:
    """Return the optimizer steps before which a run has pruned so far -> the sparsity that came out."""
    return {int(entry["step"]): entry["sparsity"] for entry in state.log_history if "sparsity" in entry}


class AveragingCallback(TrainerCallback):
    """Updates the average after every optimizer step and gives the model its weights when training ends."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.average.update(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.average.started:
            self.average.swap(kwargs["model"])
            self.average.restart()


@contextmanager
def isolated_random_state(device: torch.device) -> Iterator[None]:
    """Inside the context torch's global generators may be drawn from; afterwards they are as they were before."""
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        yield
