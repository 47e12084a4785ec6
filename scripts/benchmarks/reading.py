"""Measure how long a model waits for images while gradients are made, with and without worker processes.

    python scripts/benchmarks/reading.py --json reading.json

A folder of JPEGs of photographs' size is written, and a ViT's gradients are collected from it as `cap-hf prune` does.
The share is that of the collection's time which is spent waiting for batches.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from models import VITS, make_vit
from PIL import Image
from results import Results
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ViTImageProcessor

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset, make_dataloader

WIDTH, HEIGHT = 500, 400


def write_images(folder: Path, count: int) -> None:
    """Write JPEGs of smooth colours with some noise, about as large as those of photographs, in two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        colours = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        pixels = np.asarray(colours.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(pixels + generator.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        path = folder / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


class Timed:
    """Yields the batches of a loader, and counts the seconds in which they are waited for."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.waited = loader, 0.0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def measure(model: PreTrainedModel, dataset: ImageDataset, workers: int, batch_size: int) -> dict[str, float]:
    """Return the seconds of a collection over the whole dataset, and those in which the model waits for images."""
    compressor = CAPCompressor(model, CAPConfig(num_grads=len(dataset)), disable_tqdm=True)
    timed = Timed(make_dataloader(dataset, batch_size, workers))
    start = time.perf_counter()
    compressor.collect(timed)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "waiting": timed.waited, "share_waiting": timed.waited / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=VITS, default=["vit-tiny", "vit-small"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="gets the figures")
    args = parser.parse_args()
    runs = len(args.models) * len(args.workers)
    with tempfile.TemporaryDirectory() as folder, Results(args, runs, keys=("model", "workers")) as results:
        write_images(Path(folder), args.images)
        split = datasets.load_dataset(folder, split="train", cache_dir=str(Path(folder) / "cache"))
        for name in args.models:
            model = make_vit(name)
            side = model.config.image_size
            processor = ViTImageProcessor(size={"height": side, "width": side})
            dataset = ImageDataset(split, processor, model.config, DataArguments(dataset_name=folder), has_head=False)
            for workers in args.workers:
                results.measuring(f"{name}, {workers} workers")
                row = measure(model, dataset, workers, args.batch_size)
                results.add({"model": name, "workers": workers, **row})
                results.advance()


if __name__ == "__main__":
    main()
