"""What a GPU run does, small: the same on the CPU, on the device, and on two devices with a process each."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from cap_hf import CAPCompressor, CAPConfig, Checkpointing, PruneReport, Resources
from support import pretend
from support.models import ARCHITECTURES, build, random_batches
from support.recovery import image_processor

# Architecture, what differs from the default config. 22 gradient samples in batches of 4: no number comes out even.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cap": ("ViT", {}),
    "cap cumulative": ("ViT", {"selection": "cumulative", "damp": 1e-5, "absolute_damp": True}),
    "cap uniform": ("Swin", {"allocation": "uniform"}),
    "cap 2:4": ("Dinov2", {"allocation": "2:4"}),
    "cap 1x4": ("ViT", {"pattern": "1x4"}),
    "cap convolutions": ("ConvNext", {"fisher_block_size": 8}),
    "cap small convolutions": ("ResNet", {}),
    "cap sampled": ("DeiT", {"fisher_loss": "sampled", "samples_per_grad": 2, "num_grads": 10}),
    "cap features": ("Dinov2", {"fisher_loss": "features", "feature_projections": 2}),
    "cap bfloat16": ("ViT", {"fisher_dtype": "bfloat16"}),
    "cap independent": ("ViT", {"weight_update": "independent"}),
    "cap no update": ("ViT", {"weight_update": "none"}),
    "obs": ("DeiT", {"method": "obs"}),
    "obs 2:4": ("ViT", {"method": "obs", "allocation": "2:4"}),
    "sparsegpt": ("ViT", {"method": "sparsegpt"}),
    "sparsegpt uniform": ("ResNet", {"method": "sparsegpt", "allocation": "uniform"}),
    "wanda": ("ResNet", {"method": "wanda"}),
    "magnitude": ("ConvNext", {"method": "magnitude"}),
    "magnitude 2:4": ("ViT", {"method": "magnitude", "allocation": "2:4"}),
}

# Of them, whose collection is also interrupted.
INTERRUPTED = ("cap", "cap bfloat16", "cap features", "sparsegpt")


def accelerator_on(device: str) -> Accelerator:
    """Return a new accelerator, of the CPU or of the pretend device."""
    pretend.choose(device)
    # A process that waits for another one in vain ends soon.
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])


def loader(model: PreTrainedModel, side: int, examples: int = 24, batch_size: int = 4) -> DataLoader:
    """Return random examples that fit a model, in a random order."""
    (batch,) = random_batches(model, side, sizes=(examples,))
    return DataLoader(
        [{name: value[index] for name, value in batch.items()} for index in range(examples)], batch_size, shuffle=True
    )


def compress(
    name: str,
    accelerator: Accelerator,
    resources: Resources | None = None,
    checkpointing: Checkpointing | None = None,
    wrap: Callable[[Dataset], Dataset] = lambda dataset: dataset,
    sparsity: float = 0.6,
) -> tuple[CAPCompressor, PruneReport]:
    """Collect and prune as a case says.

    Args:
        name: of the case.
        accelerator: where.
        resources: of the collection.
        checkpointing: of the collection.
        wrap: put around the examples.
        sparsity: where the case has no pattern.
    """
    architecture, changes = CASES[name]
    config = CAPConfig(**{"num_grads": 22, **changes})
    model = build(architecture)
    compressor = CAPCompressor(model, config, accelerator, disable_tqdm=True, resources=resources)
    batches = loader(model, ARCHITECTURES[architecture][1])
    compressor.collect(DataLoader(wrap(batches.dataset), batches.batch_size, shuffle=True), checkpointing)
    report = compressor.prune(None if config.nm else sparsity)
    return compressor, report


def weights(compressor: CAPCompressor) -> dict[str, torch.Tensor]:
    """Return the targets' weights, on the CPU."""
    return {target.name: target.weight.detach().cpu().contiguous() for target in compressor.targets}


class Interrupted(KeyboardInterrupt):
    """What a run ends with that was told to."""


class Interrupting(Dataset):
    """Ends a run after some examples: in the middle of 24 in batches of 4, of one process or two."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.given = dataset, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.given += 1
        if self.given > 16:
            raise Interrupted
        return self.dataset[index]


def compress_interrupted(name: str, accelerator: Accelerator, folder: Path) -> tuple[CAPCompressor, PruneReport]:
    """As `compress`, but the collection ends in the middle and another one goes on."""
    try:
        compress(name, accelerator, checkpointing=Checkpointing(folder, 4), wrap=Interrupting)
    except Interrupted:
        compressor, report = compress(name, accelerator, checkpointing=Checkpointing(folder, 4, resume=True))
        compressor.discard_state()
        return compressor, report
    raise AssertionError("the collection was not interrupted")


def command_arguments(folder: Path) -> list[str]:
    """Return a `cap-hf prune` of a model in a folder, which is saved there."""
    build("ViT", num_channels=1).save_pretrained(folder / "dense")
    image_processor().save_pretrained(folder / "dense")
    arguments = ["--model_name_or_path", str(folder / "dense"), "--output_dir", str(folder / "out")]
    arguments += ["--sparsity", "0.5", "0.75", "--num_grads", "32", "--per_device_batch_size", "8"]
    arguments += ["--max_eval_samples", "50", "--checkpoint_every", "16"]
    return ["prune", *arguments]
