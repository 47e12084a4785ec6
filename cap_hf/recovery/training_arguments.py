"""Validate what recovery adds to transformers' TrainingArguments."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_xla_available

from cap_hf.data.workers import num_workers
from cap_hf.distributed.accelerator import TIMEOUT
from cap_hf.errors import CAPError
from cap_hf.recovery.augmentation import PRESETS
from cap_hf.recovery.schedules import SparsitySchedule


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """Says how to recover or gradually prune a model; everything else is TrainingArguments' own.

    Raises:
        CAPError: a value is outside what its field allows.
    """

    ddp_timeout: int = field(
        default=int(TIMEOUT.total_seconds()),
        metadata={"help": "Seconds that a process waits for the others; a pruning step has one of many minutes."},
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]  # a number from __post_init__ on
        default=None,
        metadata={
            "help": "Processes that read images beside the model. Default: on CUDA one less than there are cores for "
            "each process, 8 at most; none on a CPU, whose cores the model needs."
        },
    )
    do_eval: bool = field(default=True, metadata={"help": "Evaluate the model before and after."})
    hub_strategy: HubStrategy | str = field(
        default="every_save",
        metadata={
            "help": "When SparseTrainer pushes, in Python. The command pushes the recovered checkpoint, once, at the "
            "end, and refuses checkpoint and all_checkpoints."
        },
    )
    hub_always_push: bool = field(
        default=False,
        metadata={"help": "Have SparseTrainer, in Python, not skip a push while one is under way; not the command."},
    )
    sparsity_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Prune while training: start,end,steps,shape (linear or cubic); or epoch:sparsity,...; or one "
            "sparsity. Default: keep the model's zeros."
        },
    )
    restart_lr: bool = field(
        default=True,
        metadata={"help": "Restart the linear decay at every pruning step; other --lr_scheduler_type never do."},
    )
    cycle_peak_decay: float = field(
        default=1.0, metadata={"help": "Factor of the peak learning rate from one cycle to the next."}
    )
    cycle_end_lr: float = field(
        default=0.0, metadata={"help": "Learning rate that each cycle of the linear decay ends at."}
    )
    hard_label_weight: float = field(default=1.0, metadata={"help": "Weight of the cross entropy with the labels."})
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Weight of the divergence from the teacher's logits, where there is a teacher."}
    )
    distillation_temperature: float = field(default=2.0, metadata={"help": "Temperature of that divergence."})
    feature_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the error of the features to the teacher's, of a model without a head."},
    )
    hidden_state_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the normalised MSE to the teacher's hidden states. Default: 0 with a head, 1 without."
        },
    )
    teacher_bf16: bool = field(default=False, metadata={"help": "Run the teacher in bfloat16."})
    augmentation: str = field(
        default="none",
        metadata={"help": "Strength; sparse models want less than dense ones.", "choices": tuple(PRESETS)},
    )
    random_flip: bool = field(
        default=True, metadata={"help": "Let an augmentation mirror images; not where left and right differ."}
    )
    freeze_outside: bool = field(
        default=False,
        metadata={"help": "Train only the part of the model that holds what is pruned: no embeddings and no head."},
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of a moving average of the weights, which becomes the result."}
    )

    def __post_init__(self) -> None:
        if (self.bf16 or self.bf16_full_eval) and not (torch.accelerator.is_available() or is_torch_xla_available()):
            # There it trains anyway, and transformers asks to be told that bfloat16 is for the CPU.
            self.use_cpu = True
        if self.dataloader_num_workers is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.dataloader_num_workers = num_workers(None, torch.device("cuda" if cuda else "cpu"))
        super().__post_init__()
        name = "num_train_epochs" if self.max_steps < 0 else "max_steps"
        # The Trainer would take one optimizer step of 0, and of 0 epochs none.
        if not getattr(self, name) > 0:
            raise CAPError(f"{name}={getattr(self, name)} trains nothing: `cap-hf evaluate` measures a model as it is")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise CAPError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.label_smoothing_factor < 1:
            raise CAPError(f"label_smoothing_factor={self.label_smoothing_factor} is not in [0, 1)")
        if self.fp16 and not torch.cuda.is_available():
            raise CAPError("--fp16 scales its gradients on a CUDA device and there is none: use --bf16 or leave it out")
        if self.augmentation not in PRESETS:
            raise CAPError(f"augmentation={self.augmentation!r} is not one of {', '.join(PRESETS)}")
        for name in (
            "learning_rate",
            "weight_decay",
            "hard_label_weight",
            "distillation_weight",
            "feature_weight",
            "hidden_state_weight",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise CAPError(f"{name}={value} must be 0 or greater, and finite")
        if not 0 < self.distillation_temperature < float("inf"):
            raise CAPError(f"distillation_temperature={self.distillation_temperature} must be greater than 0")
        if not 0 < self.cycle_peak_decay <= 1:
            raise CAPError(f"cycle_peak_decay={self.cycle_peak_decay} is not in (0, 1]")
        if not 0 <= self.cycle_end_lr <= self.learning_rate:
            raise CAPError(f"cycle_end_lr={self.cycle_end_lr} is not between 0 and learning_rate={self.learning_rate}")
        if self.cycle_end_lr and not self.cyclic_lr:
            raise CAPError(
                "--cycle_end_lr is for the linear decay that restarts at pruning steps: give --sparsity_schedule, or "
                "--lr_scheduler_type polynomial with the lr_end of --lr_scheduler_kwargs"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise CAPError(f"ema_decay={self.ema_decay} is not between 0 and 1")
        schedule = self.schedule
        if schedule is not None and schedule.in_epochs and self.max_steps > 0:
            raise CAPError(
                "--sparsity_schedule is in epochs but the run is in --max_steps: give --num_train_epochs instead, or "
                "the schedule as start,end,steps,shape"
            )

    @property
    def folder(self) -> Path:
        """Return `output_dir`, which TrainingArguments fills in where none is given.

        Raises:
            CAPError: it was set to None since.
        """
        if self.output_dir is None:
            raise CAPError("output_dir is None: set it to the folder for the run's checkpoints")
        return Path(self.output_dir)

    @property
    def schedule(self) -> SparsitySchedule | None:
        """Return the parsed `sparsity_schedule`, or None."""
        return None if self.sparsity_schedule is None else SparsitySchedule.parse(self.sparsity_schedule)

    @property
    def cyclic_lr(self) -> bool:
        """Return whether the learning rate restarts at pruning steps."""
        linear = self.lr_scheduler_type in (SchedulerType.LINEAR, SchedulerType.LINEAR.value)
        return self.schedule is not None and self.restart_lr and linear

    def changed(self) -> dict[str, str | int | float | bool]:
        """Return every argument that is not the default, for a report; never a token or a folder."""
        return {
            each.name: value
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), (str, int, float, bool))
            and value != each.default
            and not each.name.endswith(("_dir", "_token"))
        }
