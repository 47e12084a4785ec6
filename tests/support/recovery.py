"""Tiny models and runs for the tests of recovery; as a script, a run that kills itself with SIGKILL."""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from cap_hf.config import CAPConfig
from cap_hf.data.images import collate, make_dataloader
from cap_hf.recovery.gradual import GradualPruner
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.targets import find_targets

NUM_LABELS = 4

# A run with everything that has a state: masks, pruning steps, cycles, momentum, average, augmentation.
GRADUAL = {
    "max_steps": 12,
    "save_steps": 3,
    "gradient_accumulation_steps": 2,
    "sparsity_schedule": "0.3,0.8,3,cubic",
    "augmentation": "medium",
    "ema_decay": 0.8,
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
}


def tiny_vit(seed: int = 0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": NUM_LABELS,
    }
    model = ViTForImageClassification(ViTConfig(**{**sizes, **changes}))
    # transformers initialises so small that nothing would be learnt in a test's few steps.
    with torch.no_grad():
        for target in find_targets(model):
            target.weight.mul_(8)
    return model


def sparse_vit(share: float = 0.6, seed: int = 0, **changes):
    """A ViT with the smallest weights of every target at 0."""
    return sparse(tiny_vit(seed, **changes), share)


def examples(count: int = 48, channels: int = 1, size: int = 8):
    """Images whose brightest quarter is their label, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % NUM_LABELS
    images = torch.randn(count, channels, size, size, generator=generator) / 2
    half = size // 2
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def images(count: int = 48, size: int = 8):
    """Images in colour, without labels."""
    return [{"pixel_values": each["pixel_values"]} for each in examples(count, 3, size)]


def image_processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)


def sparse(model, share: float = 0.5):
    """The model with the smallest weights of every target at 0."""
    with torch.no_grad():
        for target in find_targets(model):
            smallest = target.weight.abs().flatten().argsort()[: round(share * target.weight.numel())]
            target.weight.view(-1)[smallest] = 0
    return model


def zeros(model):
    """Where each target is 0."""
    return {target.name: target.weight.detach() == 0 for target in find_targets(model)}


def assert_same_zeros(model, expected):
    for name, zero in zeros(model).items():
        assert torch.equal(zero, expected[name]), name


def make_trainer(
    folder, model, callbacks=(), data=None, teacher=None, optimizers=(None, None), allocation="global", **changes
):
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 100,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = SparseTrainingArguments(output_dir=str(folder), **{**arguments, **changes})
    data = data or examples()
    calibration = make_dataloader(data, 16)
    return SparseTrainer(
        model,
        args,
        teacher=teacher,
        prune=GradualPruner(calibration, CAPConfig(num_grads=48, allocation=allocation), disable_tqdm=True),
        train_dataset=data,
        eval_dataset=data[:16],
        data_collator=collate,
        processing_class=image_processor(),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


class Killer(TrainerCallback):
    """SIGKILL at an optimizer step: at its `begin` (after pruning), at its `end` (before a save) or in its `save`."""

    def __init__(self, moment: str, step: int) -> None:
        self.moment, self.step = moment, step

    def kill(self, moment: str, state) -> None:
        if (moment, state.global_step) == (self.moment, self.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args, state, control, **kwargs):
        self.kill("begin", state)

    def on_step_end(self, args, state, control, **kwargs):
        self.kill("end", state)


def main() -> None:
    folder, moment, step, changes = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    killer = Killer(moment, step)
    trainer = make_trainer(folder, tiny_vit(), **changes)
    # Last of all callbacks, so that a pruning step of the same moment is over.
    trainer.add_callback(killer)
    if moment == "save":
        save_optimizer = trainer._save_optimizer_and_scheduler

        def save_and_die(output_dir):
            save_optimizer(output_dir)
            killer.kill("save", trainer.state)

        trainer._save_optimizer_and_scheduler = save_and_die
    trainer.train()
    save_file(trainer.model.state_dict(), str(Path(folder) / "final.safetensors"))


if __name__ == "__main__":
    main()
