"""What SparseTrainer costs over transformers' Trainer on the same dense model without a teacher.

Both trainers take turns in one process, a few optimizer steps each, so that whatever else the machine does meets
both. The overhead is the ratio of the medians of all steps; each turn's first step warms up and is not counted.
"""

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
from results import Results
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
)

from cap_hf import SparseTrainer, SparseTrainingArguments
from cap_hf.data.images import collate


class StepTimes(TrainerCallback):
    """Note the seconds from the end of each optimizer step to the end of the next, with every callback and hook."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self.ends)]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_model(name: str | None) -> PreTrainedModel:
    """Return a dense model: of a checkpoint's configuration, or a small ViT."""
    torch.manual_seed(0)
    sizes = {"image_size": 28, "patch_size": 4, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4}
    config = AutoConfig.from_pretrained(name) if name else ViTConfig(**sizes, num_attention_heads=3)
    return AutoModelForImageClassification.from_config(config)


def run_turn(kind: type, model: PreTrainedModel, data: list[dict], args: argparse.Namespace) -> list[float]:
    """Return the seconds of each optimizer step of one turn, without the first."""
    arguments = SparseTrainingArguments if kind is SparseTrainer else TrainingArguments
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        training = arguments(
            output_dir=folder,
            max_steps=args.steps + 1,
            per_device_train_batch_size=args.per_device_train_batch_size,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = kind(model, training, train_dataset=data, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(times)
        trainer.train()
    return times.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="take this checkpoint's configuration; default: a small ViT")
    parser.add_argument("--per_device_train_batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per turn")
    parser.add_argument("--turns", type=int, default=6, help="turns of each trainer")
    parser.add_argument("--json", metavar="FILE", help="gets the figures")
    args = parser.parse_args()

    model = make_model(args.model_name_or_path)
    config = model.config
    channels, size = config.num_channels, config.image_size
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.randn(channels, size, size, generator=generator),
            "labels": torch.tensor(index % config.num_labels),
        }
        for index in range(4 * args.per_device_train_batch_size)
    ]
    seconds: dict[str, list[float]] = {"Trainer": [], "SparseTrainer": []}
    with Results(args, total=2 * args.turns) as results:
        results.set(
            per_device_train_batch_size=args.per_device_train_batch_size,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            device="cuda" if torch.cuda.is_available() else platform.processor() or platform.machine(),
        )
        for turn in range(args.turns):
            # Who goes first changes, so that nobody always meets warm caches.
            for kind in (Trainer, SparseTrainer) if turn % 2 == 0 else (SparseTrainer, Trainer):
                results.measuring(kind.__name__)
                seconds[kind.__name__] += run_turn(kind, model, data, args)
                results.advance()
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            results.set(
                seconds=seconds,
                median_seconds_per_step=medians,
                overhead=medians["SparseTrainer"] / medians["Trainer"] - 1,
                steps_of_each=len(seconds["Trainer"]),
            )
    for name, value in medians.items():
        print(f"{name:<14} {1000 * value:8.2f} ms per step (median of {len(seconds[name])})")
    print(f"overhead       {100 * results.content['overhead']:8.2f} %")


if __name__ == "__main__":
    main()
