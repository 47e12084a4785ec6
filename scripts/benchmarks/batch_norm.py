"""What estimating batch norm anew is worth: a small ResNet, pruned in one shot, with its old and its new statistics.

    python scripts/benchmarks/batch_norm.py --dataset_name cifar10 --json batch_norm.json

Per seed a ResNet is trained, and pruned to every sparsity. Top-1 % on the test images with: the dense model's
statistics; averages of batches of 64 in training mode, the usual practice; and `recalibrate_batch_norm` from several
numbers of examples.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from results import Results
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor, set_seed

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.batch_norm import batch_norms, recalibrate_batch_norm
from cap_hf.distributed.processes import Processes

BATCH = 64
WIDTHS = [32, 64, 128]
# About those of CIFAR-10's pixels, from 0 to 1.
MEAN, DEVIATION = 0.47, 0.25


def load(folder: str, split: str, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images `(n, channels, h, w)`, scaled, and labels `(n,)`, of a folder of parquet files."""
    rows = load_dataset("parquet", data_dir=folder, split=split)
    rows = rows.select(range(min(count or len(rows), len(rows))))
    label = "label" if "label" in rows.column_names else "labels"
    images = np.stack([np.asarray(image) for image in rows["image"]])
    pixels = torch.from_numpy(images).float().reshape(*images.shape[:3], -1).permute(0, 3, 1, 2)
    return (pixels / 255 - MEAN) / DEVIATION, torch.tensor(rows[label])


def train(pixels: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> ResNetForImageClassification:
    """Return a ResNet that was trained with one cycle of the learning rate."""
    set_seed(seed)
    config = ResNetConfig(
        num_channels=pixels.shape[1],
        embedding_size=WIDTHS[0],
        hidden_sizes=WIDTHS,
        depths=[2] * len(WIDTHS),
        layer_type="basic",
        num_labels=int(labels.max()) + 1,
    )
    model = ResNetForImageClassification(config).train()
    steps = epochs * -(-len(pixels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(pixels)).split(BATCH):
            # Half of the images mirrored.
            images = pixels[part].flip(-1) if torch.rand(()) < 0.5 else pixels[part]
            optimizer.zero_grad()
            F.cross_entropy(model(images).logits, labels[part]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return top-1 %."""
    found = torch.cat([model(part).logits.argmax(-1) for part in pixels.split(250)])
    return 100 * (found == labels).double().mean().item()


@torch.no_grad()
def average_batches(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    """Estimate batch norm in the usual way: the mean over batches in training mode."""
    for layer in batch_norms(model).values():
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    for part in pixels.split(BATCH):
        model(part)
    model.eval()


def estimate(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    """Estimate batch norm as the package does."""
    recalibrate_batch_norm(model, [{"pixel_values": pixels}], Processes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="folder of parquet files with images and labels")
    parser.add_argument("--json", metavar="FILE", type=Path, help="gets the figures")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--methods", nargs="+", default=["cap", "magnitude"])
    parser.add_argument("--examples", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--num_grads", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="FOLDER", help="save the first ResNet there, dense, and measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pixels, labels = load(args.dataset_name, "train", args.max_train_samples)
    if args.save:
        save(train(pixels, labels, args.epochs, 0), pixels.shape, args.save)
        return
    test = load(args.dataset_name, "test", None)

    with Results(args, args.seeds * len(args.methods) * len(args.sparsity), keys=("seed", "sparsity")) as results:
        for seed in range(args.seeds):
            results.measuring(f"training, seed {seed}")
            model = train(pixels, labels, args.epochs, seed)
            order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
            calibration = pixels[order[: max(args.num_grads, *args.examples)]]
            batches = [
                {"pixel_values": pixels[part], "labels": labels[part]} for part in order[: args.num_grads].split(BATCH)
            ]
            ways: dict[str, Callable[[torch.nn.Module], object]] = {
                "old": lambda model: None,
                "averages": partial(average_batches, pixels=calibration),
                **{f"new, {count}": partial(estimate, pixels=calibration[:count]) for count in args.examples},
            }
            dense = {way: accuracy(changed(model, change), *test) for way, change in ways.items()}
            results.add({"method": "dense", "seed": seed, "sparsity": 0, **dense})
            for method in args.methods:
                config = CAPConfig(method=method, num_grads=args.num_grads)
                compressor = CAPCompressor(copy.deepcopy(model), config, disable_tqdm=True).collect(batches)
                for sparsity in args.sparsity:
                    results.measuring(f"seed {seed}, {method}, {sparsity:g}")
                    compressor.prune(sparsity)
                    found = {way: accuracy(changed(compressor.model, change), *test) for way, change in ways.items()}
                    results.add({"method": method, "seed": seed, "sparsity": sparsity, **found})
                    results.advance()
    print(table(results.content["results"], list(ways)))


def save(model: ResNetForImageClassification, shape: torch.Size, folder: str) -> None:
    """Save a model with an image processor that makes of images what `load` does."""
    _, channels, height, width = shape
    size, mean, deviation = {"height": height, "width": width}, [MEAN] * channels, [DEVIATION] * channels
    ViTImageProcessor(size=size, image_mean=mean, image_std=deviation).save_pretrained(folder)
    model.save_pretrained(folder)


def changed(model: torch.nn.Module, change: Callable[[torch.nn.Module], object]) -> torch.nn.Module:
    """Return a copy of a model with other statistics."""
    model = copy.deepcopy(model)
    change(model)
    return model


def table(rows: list[dict], ways: list[str]) -> str:
    """Return the means over the seeds, with the deviations of single seeds from them, as Markdown."""
    lines = [f"| method | sparsity | {' | '.join(ways)} |", f"| --- | ---: |{' ---: |' * len(ways)}"]
    for method, sparsity in dict.fromkeys((row["method"], row["sparsity"]) for row in rows):
        same = [row for row in rows if (row["method"], row["sparsity"]) == (method, sparsity)]
        cells = [
            f"{statistics.mean(row[way] for row in same):.2f} ± {statistics.pstdev([row[way] for row in same]):.2f}"
            for way in ways
        ]
        lines.append(f"| {method} | {sparsity:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
