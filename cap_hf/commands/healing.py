"""How `cap-hf prune` heals: each sparse model of a run learns from the dense one, in the same run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cap_hf.errors import CAPError
from cap_hf.recovery.presets import HEAL

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.data import Dataset
    from transformers import PreTrainedModel

    from cap_hf.checkpoints.form import StoredForm
    from cap_hf.compressor import CAPCompressor


@dataclass
class HealArguments:
    """Whether and how each pruned model is healed: trained without labels towards the dense one, with its zeros held.

    Raises:
        CAPError: a value is outside what its field allows.
    """

    heal_steps: int = field(
        default=0,
        metadata={
            "help": "Steps of training towards the dense model's hidden states and logits, on train images without "
            "their labels; 0 heals nothing, 300 is what `cap-hf finetune --preset heal` takes."
        },
    )
    heal_batch_size: int = field(
        default=HEAL["per_device_train_batch_size"], metadata={"help": "Images per step of healing and process."}
    )
    heal_learning_rate: float = field(default=HEAL["learning_rate"], metadata={"help": "Of healing, at its peak."})
    heal_bf16: bool = field(
        default=False, metadata={"help": "Heal in bfloat16 mixed precision: faster where the processor has it."}
    )

    def __post_init__(self) -> None:
        if self.heal_steps < 0:
            raise CAPError(f"heal_steps={self.heal_steps} must be at least 0")
        if self.heal_batch_size < 1:
            raise CAPError(f"heal_batch_size={self.heal_batch_size} must be at least 1")
        if not 0 < self.heal_learning_rate < float("inf"):
            raise CAPError(f"heal_learning_rate={self.heal_learning_rate} must be greater than 0, and finite")
        usual = (HEAL["per_device_train_batch_size"], HEAL["learning_rate"], False)
        if not self.heal_steps and (self.heal_batch_size, self.heal_learning_rate, self.heal_bf16) != usual:
            raise CAPError("nothing is healed without --heal_steps: give a number of them, such as 300")

    def num_images(self, processes: int) -> int:
        """Return how many images healing sees in so many processes, where the dataset has as many."""
        return self.heal_steps * self.heal_batch_size * processes


class Healing:
    """Heals the sparse models that one dense model is pruned to.

    Args:
        model: dense; it will be pruned and healed in place, and goes to the device of the accelerator.
        dataset: of the images to heal on.
        args: of which `heal_steps` is not 0.
        seed: of the order of the images and of flips.
        num_workers: processes that read images, as of `cap_hf.data.workers.num_workers`.
        accelerator: from accelerate.
        disable_tqdm: no progress bar.

    Attributes:
        teacher: a copy of the model as it is now.

    Raises:
        CAPError: as `cap_hf.recovery.healing.heal`, of what can be said before any work.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        dataset: "Dataset",
        args: HealArguments,
        seed: int,
        num_workers: int | None,
        accelerator: "Accelerator",
        disable_tqdm: bool,
    ) -> None:
        import copy

        from cap_hf.recovery.healing import check_healing
        from cap_hf.recovery.precision import check_bfloat16

        if args.heal_bf16 and accelerator.device.type == "cpu":
            check_bfloat16(["--heal_bf16"])
        # Where healing will train it.
        self.model = model.to(accelerator.device)  # type: ignore[arg-type]  # as of Teacher
        self.dataset, self.args = dataset, args
        self.options: dict[str, Any] = {"seed": seed, "num_workers": num_workers, "disable_tqdm": disable_tqdm}
        self.teacher = copy.deepcopy(model)
        check_healing(model, self.teacher, dataset, args.heal_bf16)

    def restore(self) -> None:
        """Give the model all of its dense weights back: healing has moved more of them than pruning sets."""
        self.model.load_state_dict(self.teacher.state_dict())

    def heal(self, compressor: "CAPCompressor", form: "StoredForm") -> tuple[dict[str, Any], "StoredForm"]:
        """Heal the model as it was pruned last, and round it to what it will be stored in.

        Args:
            compressor: whose report then tells of the zeros as they are.
            form: that the dense model is stored in.

        Returns:
            What was done, for a report, and the form that holds all of the healed weights.
        """
        from cap_hf.checkpoints.form import fitting_form, round_weights
        from cap_hf.collection.reporting import recount
        from cap_hf.recovery.healing import heal

        args = self.args
        done = heal(
            self.model,
            self.teacher,
            self.dataset,
            args.heal_steps,
            args.heal_batch_size,
            args.heal_learning_rate,
            args.heal_bf16,
            **self.options,
        )
        form = fitting_form(form, self.model)
        round_weights(self.model, form.dtype)
        assert compressor.report is not None  # it was pruned
        recount(compressor.report, compressor.targets, "healed", form.dtype)
        return done.to_dict(), form
