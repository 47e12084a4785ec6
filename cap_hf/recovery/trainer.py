"""SparseTrainer: transformers' Trainer that keeps zeros, prunes on a schedule and learns from a teacher."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import ModelOutput

from cap_hf.errors import CAPError, reason
from cap_hf.recovery.augmentation import PRESETS, make_augmentation
from cap_hf.recovery.averaging import WeightAverage
from cap_hf.recovery.callbacks import AveragingCallback, MaskCallback, PruneStep, PruningCallback
from cap_hf.recovery.distillation import (
    Teacher,
    check_labels,
    check_outputs,
    hidden_state_loss,
    logit_loss,
    student_logits,
)
from cap_hf.recovery.mask_holder import MaskHolder
from cap_hf.recovery.schedules import cyclic_linear
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.targets import find_targets, summarize


class SparseTrainer(Trainer):
    """A Trainer under which no zero of the model ever comes back.

    Masks come from the model: a weight that is exactly 0 when training begins stays 0. They are verified whenever
    the model is saved. With `args.sparsity_schedule` the model is pruned further while it trains, with `teacher` it
    learns from a dense one, with `args.ema_decay` it ends as the average of its weights; everything else is the
    Trainer's own.

    Args:
        model: an image classifier, dense or sparse.
        args: SparseTrainingArguments.
        teacher: a dense model with the same labels; frozen and never saved.
        prune: what a pruning step of the schedule calls, such as `cap_hf.GradualPruner`.
        **kwargs: the Trainer's; `processing_class`, the image processor, is needed for augmentation.

    Raises:
        CAPError: teacher, schedule and model do not fit together; from `train` and `save_model`: a pruned weight is
            not 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SparseTrainingArguments,
        teacher: PreTrainedModel | None = None,
        prune: PruneStep | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, SparseTrainingArguments):
            raise CAPError(f"SparseTrainer needs SparseTrainingArguments, not {type(args).__name__}")
        if kwargs.get("model_init") is not None:
            raise CAPError("SparseTrainer takes its masks from the model it is given: pass model, not model_init")
        super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise CAPError("masks are held on whole weights, which FSDP and DeepSpeed split: use DDP")
        self.masks = MaskHolder(model)
        self.average = WeightAverage(model, args.ema_decay) if args.ema_decay is not None else None
        # The average goes first: at the end of training the masks are verified on what it leaves.
        if self.average is not None:
            self.add_callback(AveragingCallback(self.average))
        self.add_callback(MaskCallback(self.masks))
        if args.schedule is not None:
            if prune is None:
                raise CAPError("a sparsity schedule needs something that prunes: pass prune=GradualPruner(...)")
            args.schedule.check_start(*count_zeros(model))
            self.add_callback(
                PruningCallback(self.masks, args.schedule, prune, self.accelerator, self.average, self.log)
            )

        self.augmentation = make_augmentation(
            args.augmentation, self.processing_class, model.config.num_labels, args.random_flip
        )
        if self.augmentation is not None:
            self.augmentation.to(args.device)
        self.label_smoothing = args.label_smoothing_factor or PRESETS[args.augmentation].label_smoothing
        self.teacher = self._make_teacher(teacher)
        # Classes with DeiT's distillation token take no labels and return no loss.
        self.takes_labels = bool(self.label_names)
        self.label_names = self.label_names or ["labels"]
        self.own_loss = self.teacher is not None or self.augmentation is not None or not self.takes_labels
        if self.own_loss:
            # A mean over each batch, which the Trainer then divides by the accumulation steps.
            self.model_accepts_loss_kwargs = False

    def _make_teacher(self, model: PreTrainedModel | None) -> Teacher | None:
        args = self.args
        if model is None or not (args.distillation_weight or args.hidden_state_weight):
            return None
        check_labels(self.model.config, model.config)
        teacher = Teacher(model, args.device, args.teacher_bf16)
        # A dataset that can only be iterated over is not begun for a check.
        if hasattr(self.train_dataset, "__getitem__"):
            example = torch.as_tensor(self.train_dataset[0]["pixel_values"])[None].to(args.device)
            check_outputs(self.model, teacher, example, args.hidden_state_weight > 0)
        return teacher

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's; `resume_from_checkpoint=True` skips checkpoints that a crash left half written."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CAPError(f"there is no checkpoint to resume from in {self.args.output_dir}")
        if self.average is not None:
            self.average.restart()
            if resume_from_checkpoint:
                self.average.load(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """A linear decay that restarts at every pruning step, unless another scheduler is asked for."""
        if self.lr_scheduler is None and self.args.cyclic_lr:
            starts = self.args.schedule.at_steps(num_training_steps, self.args.num_train_epochs)
            warmup = self.args.get_warmup_steps(num_training_steps)
            factor = cyclic_linear(list(starts), num_training_steps, warmup, self.args.cycle_peak_decay)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """The Trainer's loss; in training with a teacher or augmentation the weighted sum of its parts."""
        recovering = model.training and self.own_loss
        if self.takes_labels and not recovering:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if recovering and self.augmentation is not None:
            inputs["pixel_values"], labels = self.augmentation(inputs["pixel_values"], labels)
        matches_hidden = recovering and self.teacher is not None and self.args.hidden_state_weight > 0
        outputs = model(**inputs, output_hidden_states=matches_hidden)
        hard, soft = student_logits(outputs)
        if self.teacher is None or not recovering:
            hard = outputs["logits"]
        loss = F.cross_entropy(hard.float(), labels, label_smoothing=self.label_smoothing if recovering else 0.0)
        if recovering and self.teacher is not None:
            teacher_logits, teacher_states = self.teacher(inputs["pixel_values"], matches_hidden)
            loss = self.args.hard_label_weight * loss
            loss = loss + self.args.distillation_weight * logit_loss(
                soft, teacher_logits, self.args.distillation_temperature
            )
            if matches_hidden:
                loss = loss + self.args.hidden_state_weight * hidden_state_loss(
                    outputs["hidden_states"], teacher_states
                )
        if not return_outputs:
            return loss
        return loss, {"loss": loss, "logits": outputs["logits"]}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer's, of the averaged weights where there are any."""
        if self.average is None:
            return super().evaluation_loop(*args, **kwargs)
        with self.average.applied(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, once every mask is verified; a checkpoint to resume from gets the average as well."""
        self.masks.verify()
        averaging = self.average is not None and self.average.started
        if averaging:
            self.masks.verify(self.average.model)
        super().save_model(output_dir, _internal_call)
        if averaging and _internal_call and self.args.should_save:
            self.average.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_weights(self.model, self.state.best_model_checkpoint)
        if self.average is not None:
            self.average.load(self.state.best_model_checkpoint)


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load a checkpoint's weights into a model, in place, as `from_pretrained` reads them.

    The Trainer's own loading takes the file's names as they are. `save_pretrained` writes many models under older
    names than those of the modules, so that the Trainer of transformers 5.23 leaves their encoders as they were,
    with a warning.

    Raises:
        CAPError: the checkpoint cannot be loaded, or is another model's.
    """
    try:
        loaded, info = type(model).from_pretrained(
            checkpoint, dtype=model.dtype, use_safetensors=True, output_loading_info=True
        )
        lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        if lost:
            raise ValueError(f"it has no weights for {summarize(lost, 3)}")
        model.load_state_dict(loaded.state_dict())
    except Exception as error:  # file format, names, shapes
        raise CAPError(f"{checkpoint} cannot be loaded: {reason(error)}") from error


def count_zeros(model: nn.Module) -> tuple[int, int]:
    """How many of the target weights are 0, and how many there are."""
    weights = [target.weight for target in find_targets(model)]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def model_sparsity(model: nn.Module) -> float:
    """Share of the target weights that are 0."""
    zeros, total = count_zeros(model)
    return zeros / total


def last_whole_checkpoint(directory: str | Path) -> str | None:
    """The newest `checkpoint-*` that the Trainer finished: it writes `trainer_state.json` last; None without one."""
    found = []
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        match = re.fullmatch(r"checkpoint-(\d+)", name)
        path = Path(directory) / name
        if not match:
            continue
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        found.append((int(match[1]), str(path)))
    return max(found)[1] if found else None
