"""Extend transformers' Trainer: keep zeros, prune on a schedule, learn from a teacher."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, SchedulerType, TrainOutput
from transformers.training_args import OptimizerNames

from cap_hf.checkpoints.places import writing
from cap_hf.errors import CAPError, reason
from cap_hf.failures import explained
from cap_hf.models import usable_of_transformers
from cap_hf.outputs import check_task, label_names
from cap_hf.recovery.augmentation import PRESETS, make_augmentation
from cap_hf.recovery.averaging import WeightAverage
from cap_hf.recovery.callbacks import AveragingCallback, MaskCallback, PruneStep, PruningCallback
from cap_hf.recovery.distillation import check_returns
from cap_hf.recovery.freezing import frozen_outside
from cap_hf.recovery.gradual import GradualPruner
from cap_hf.recovery.inputs import collated, has_labels, trainable
from cap_hf.recovery.mask_holder import MaskHolder
from cap_hf.recovery.objective import FeatureObjective, LabelObjective, make_objective
from cap_hf.recovery.precision import check_bfloat16
from cap_hf.recovery.resume import choose_checkpoint, load_weights
from cap_hf.recovery.schedules import cyclic_linear
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.targets import summarize
from cap_hf.towers import image_shape, in_precision_of


class SparseTrainer(Trainer):
    """Trains a model none of whose zeros ever comes back.

    Masks come from the model: a weight that is exactly 0 when training begins stays 0. They are verified whenever
    the model is saved. With `args.sparsity_schedule` the model is pruned further while it trains, with `teacher` it
    learns from a dense one, with `args.ema_decay` it ends as the average of its weights; everything else is the
    Trainer's own. Examples without labels, or labelled -100, learn from the teacher alone.

    A model without a head learns the teacher's features and hidden states, whatever labels there are. Of one that also
    reads, such as CLIP, the vision tower alone is trained; the rest stays as it is, and the whole is saved.

    Args:
        model: an image classifier, a backbone or a model with a vision tower, dense or sparse.
        args: SparseTrainingArguments.
        teacher: a dense model with the same labels or, for a model without a head, with features of the same shapes;
            another object than the model, frozen and never saved.
        prune: what a pruning step of the schedule calls, such as `cap_hf.GradualPruner`.
        **kwargs: the Trainer's; `processing_class`, the image processor, is needed for augmentation.

    Raises:
        CAPError: the model or the teacher cannot be used as it is (see `cap_hf.models.usable_of_transformers`);
            teacher, schedule, model and processor do not fit together; from `train` and `save_model`: a pruned weight
            is not 0, or a weight is not finite.
    """

    # Narrower than the Trainer's own.
    model: PreTrainedModel
    args: SparseTrainingArguments

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
        model, teacher = trainable(model), None if teacher is None else usable_of_transformers(teacher)
        if teacher is model:
            raise CAPError("the teacher is the model itself, and a teacher is frozen: load it a second time")
        check_returns(model, "model")
        self.label_smoothing = args.label_smoothing_factor or PRESETS[args.augmentation].label_smoothing
        self.objective: LabelObjective | FeatureObjective = make_objective(model, teacher, args, self.label_smoothing)
        self.teacher = self.objective.teacher
        if args.device.type == "cpu":
            asked = {"--bf16": args.bf16, "--teacher_bf16": args.teacher_bf16 and self.teacher is not None}
            if any(asked.values()):
                check_bfloat16([name for name, value in asked.items() if value])
        super().__init__(model, args, **kwargs)
        self.data_collator = partial(collated, self.data_collator)
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
            if isinstance(prune, GradualPruner):
                prune.check(model, args.schedule)
            self.add_callback(
                PruningCallback(self.masks, args.schedule, prune, self.accelerator, self.average, self.log)
            )

        learns_features = isinstance(self.objective, FeatureObjective)
        num_labels = 0 if learns_features else len(label_names(model.config))
        self.augmentation = make_augmentation(args.augmentation, self.processing_class, num_labels, args.random_flip)
        if self.augmentation is not None:
            self.augmentation.to(args.device)
        # Classes with DeiT's distillation token take no labels and return no loss.
        self.takes_labels = bool(self.label_names) and not learns_features
        self.label_names = [] if learns_features else self.label_names or ["labels"]
        self.own_loss = self.teacher is not None or self.augmentation is not None or not self.takes_labels
        if self.teacher is not None:
            self.can_return_loss = True
            example = self._example()
            if example is not None:
                self.objective.check(example)
        if self.own_loss:
            if not learns_features:
                check_task(model, "a teacher and augmentation are", "leave both out")
            if self.compute_loss_func is not None:
                raise CAPError("compute_loss_func would replace what a teacher and augmentation add to the loss")
            # A mean over each batch, which the Trainer then divides by the accumulation steps.
            self.model_accepts_loss_kwargs = False

    def _example(self) -> dict[str, torch.Tensor] | None:
        """Return the inputs of one image to train on; None of a dataset that can only be iterated over, not begun."""
        dataset: Any = self.train_dataset
        if not hasattr(dataset, "__getitem__"):
            return None
        example = dataset[0]
        # Some datasets leave the pixels to the collator.
        there = isinstance(example, Mapping) and "pixel_values" in example
        batch = example if there else self.data_collator([example])
        pixels = torch.as_tensor(batch["pixel_values"])
        return {"pixel_values": pixels if pixels.dim() == 4 else pixels[None]}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does; `resume_from_checkpoint=True` skips checkpoints that a crash left half written."""
        resume_from_checkpoint = choose_checkpoint(self.args.folder, resume_from_checkpoint)
        if self.average is not None:
            self.average.restart()
            if resume_from_checkpoint:
                self.average.load(resume_from_checkpoint)
        objective = self.objective
        with ExitStack() as stack:
            # A training that is broken off does not get to its end, where the callback lets go.
            stack.callback(self.masks.detach)
            if isinstance(objective, FeatureObjective):
                stack.enter_context(objective.student.trained())
            if self.args.freeze_outside:
                stack.enter_context(frozen_outside(self.model))
            outcome = super().train(resume_from_checkpoint, *args, **kwargs)
        check_finite(self.model)
        return outcome

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Make the optimizer as the Trainer does; a setting or a package that it lacks is one line."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, TypeError, ValueError) as error:
            raise CAPError(
                f"--optim {OptimizerNames(self.args.optim).value} cannot be made: {reason(error)}"
            ) from error

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Make a linear decay that restarts at every pruning step, unless another scheduler is asked for."""
        schedule, optimizer = self.args.schedule, optimizer or self.optimizer
        if self.lr_scheduler is None and self.args.cyclic_lr and schedule is not None and optimizer is not None:
            starts = schedule.at_steps(num_training_steps, self.args.num_train_epochs)
            warmup = self.args.get_warmup_steps(num_training_steps)
            end = self.args.cycle_end_lr / self.args.learning_rate if self.args.learning_rate else 0.0
            factor = cyclic_linear(list(starts), num_training_steps, warmup, self.args.cycle_peak_decay, end)
            self.lr_scheduler = LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            kind = SchedulerType(self.args.lr_scheduler_type).value
            raise CAPError(f"--lr_scheduler_type {kind} cannot be made: {reason(error)}") from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the Trainer's loss; in training with a teacher or augmentation the weighted sum of its parts."""
        recovering = model.training and self.own_loss
        # The model's own loss of a batch without any label is 0 / 0.
        if self.takes_labels and not recovering and has_labels(inputs, self.label_names):
            with explained(self.model, inputs, image_shape):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if recovering and self.augmentation is not None:
            inputs["pixel_values"], labels = self.augmentation(inputs["pixel_values"], labels)
        with explained(self.model, inputs, image_shape):
            loss, outputs = self.objective(model, inputs, labels, recovering)
        return (loss, {"loss": loss, **outputs}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Evaluate a batch as the Trainer does; of images alone the loss is the teacher's, where there is one."""
        names = self.label_names
        if not any(name in inputs for name in names):
            self.label_names = []
        try:
            with explained(self.model, inputs, image_shape):
                return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.label_names = names

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return in_precision_of(self.model, super()._prepare_inputs(inputs))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the Trainer does, the averaged weights where there are any."""
        if self.average is None:
            return super().evaluation_loop(*args, **kwargs)
        with self.average.applied(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does, once every mask is verified; a checkpoint to resume from gets the average too."""
        check_finite(self.model)
        self.masks.verify()
        average = self.average if self.average is not None and self.average.started else None
        if average is not None:
            self.masks.verify(average.model)
        super().save_model(output_dir, _internal_call)
        # Without a folder of its own it is no checkpoint: a push saves the model as it is.
        if average is not None and _internal_call and output_dir is not None and self.args.should_save:
            average.save(output_dir)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Only here is what goes wrong about the folder: training itself may fill other disks, such as /dev/shm.
        with writing(self.args.folder):
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None:  # the Trainer does not ask then
            return
        load_weights(self.model, best)
        if self.average is not None:
            self.average.load(best)


def check_finite(model: nn.Module) -> None:
    """Raise a CAPError that names the parameters with an entry that is infinite or not a number."""
    broken = [name for name, value in model.named_parameters() if not value.detach().isfinite().all()]
    if broken:
        raise CAPError(
            f"training diverged: {summarize(broken, 3)} is no longer finite; lower --learning_rate (of cap-hf prune "
            "--heal_learning_rate), warm up or clip"
        )
