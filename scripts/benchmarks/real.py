"""Measure a prune of a real checkpoint in little memory: seconds, memory, disk, and what the plan had foreseen of them.

    python scripts/benchmarks/real.py --model_name_or_path M --dataset_name D --json real.json

Three kinds of work: the whole checkpoint in whole rows; the first two layers of a ViT of random weights, with the plan
for all of its layers beside; and eliminations of blocks whose Fishers are those of both. Run it on two commits in turns
and compare the files with compare.py. Two processes beside one are in scale.py.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from models import VITS, make_batches, make_vit
from results import Results
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from cap_hf import CAPCompressor, CAPConfig, Resources
from cap_hf.collection.costs import synchronize
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset, calibration_split, make_dataloader
from cap_hf.data.splits import load_splits
from cap_hf.report import Phases

WORK = ("checkpoint", "layers", "elimination")
# Seconds between two looks at the disk.
PAUSE = 0.2


class Disk:
    """The most bytes that there were in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self._over = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the folder again and again while something else goes on."""
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(PAUSE):
            sizes = 0
            for path in self.folder.rglob("*"):
                try:
                    sizes += path.stat().st_size
                except FileNotFoundError:  # removed since it was listed
                    continue
            self.most = max(self.most, sizes)


def prune(
    model: PreTrainedModel, batches: DataLoader | list, config: CAPConfig, max_memory: str, args: argparse.Namespace
) -> tuple[dict[str, object], CAPCompressor]:
    """Return what a collection, a prune to 75 % and a refit took, and was foreseen to take."""
    with tempfile.TemporaryDirectory() as folder:
        resources = Resources(max_memory, spill_dir=folder if args.spill else "none")
        compressor = CAPCompressor(model, config, resources=resources, refits=True)
        (forecast,) = compressor.forecast(batches, (1,))
        disk, phases, start, worked = Disk(Path(folder)), Phases(), time.perf_counter(), time.process_time()
        with disk.watched():
            for name, work in (
                ("collect", lambda: compressor.collect(batches)),
                ("prune", lambda: compressor.prune(0.75)),
                ("refit", lambda: compressor.refit(batches)),
            ):
                with phases(name):
                    work()
        seconds, plan = time.perf_counter() - start, compressor.plan
        worked = time.process_time() - worked
    assert plan is not None
    row = {
        "threads": args.threads,
        "seconds": seconds,
        # Of all threads: what else runs on the machine changes them less.
        "processor_seconds": worked,
        "planned_seconds": sum(forecast.seconds.values()),
        "peak_bytes": max(each["peak_memory_bytes"]["cpu"] for each in phases.records),
        "planned_bytes": plan.needed,
        "disk_bytes": disk.most,
        "passes": plan.num_passes,
        "keeps": plan.keeps,
        "phases": {each["phase"]: each["seconds"] for each in phases.records},
        "planned": dict(forecast.seconds),
    }
    return row, compressor


def eliminate(compressor: CAPCompressor, blocks: int, repeats: int) -> dict[str, object]:
    """Return the seconds of the elimination of blocks of a collected model's largest target, damping included."""
    assert compressor.paths is not None
    target = max(compressor.targets, key=lambda each: each.block_size)
    count = min(blocks, target.num_blocks)
    weights = target.weight.detach().reshape(-1, target.block_size)[:count]
    seconds = []
    for _ in range(repeats):
        synchronize(weights.device)
        start = time.perf_counter()
        # A few at a time, as a prune does: all their Fishers in float64 would be several gigabytes.
        compressor.paths.solver.eliminate(target, weights, None, lambda count, work: None)
        synchronize(weights.device)
        seconds.append(time.perf_counter() - start)
    return {"blocks": count, "block_size": target.block_size, "seconds": sorted(seconds)[len(seconds) // 2]}


def eliminate_longest(args: argparse.Namespace, of_vit: bool, config: CAPConfig, blocks: int) -> dict[str, object]:
    """Return what `eliminate` does of the layer with the longest rows, the last of its kind, whose sums go with it."""
    if of_vit:
        model, batches = random_vit(args, config.num_grads)
    else:
        model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)
        batches = loader_of(args, model, args.num_grads)
    longest = max(CAPCompressor(model, config).targets, key=lambda each: (each.row_size, each.index))
    return eliminate(
        CAPCompressor(model, replace(config, include=[longest.name])).collect(batches), blocks, args.repeats
    )


def first_layers(model: PreTrainedModel, count: int) -> list[str]:
    """Return patterns of the names of a ViT's first layers."""
    return [f"*.layers.{number}.*" for number in range(count)]


def loader_of(args: argparse.Namespace, model: PreTrainedModel, num_examples: int) -> DataLoader:
    """Return the batches of so many calibration examples."""
    data_args = DataArguments(dataset_name=args.dataset_name)
    split = load_splits(data_args, 0, needed=["train"], train_examples=num_examples)["train"]
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    examples = calibration_split(split, num_examples, 0)
    return make_dataloader(ImageDataset(examples, processor, model.config, data_args), args.batch_size)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a classifier")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--only", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--num_grads", type=int, default=1024, help="of the checkpoint; the layers have half of them")
    parser.add_argument("--max_memory", default="10GB", help="for the checkpoint")
    parser.add_argument(
        "--spill", action=argparse.BooleanOptionalAction, default=True, help="whether sums may go to a disk"
    )
    parser.add_argument("--vit", choices=VITS, default="vit-base")
    parser.add_argument("--vit_memory", default="12GB")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs=2, default=[256, 64], help="of the checkpoint and of the ViT")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="of the eliminations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="gets the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = CAPConfig(num_grads=args.num_grads, fisher_block_size="row")
    half = replace(config, num_grads=args.num_grads // 2)
    with Results(args, total=len(args.only), keys=("work",)) as results:
        if "checkpoint" in args.only:
            results.measuring("the checkpoint")
            model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)
            row, _ = prune(model, loader_of(args, model, args.num_grads), config, args.max_memory, args)
            results.add({"work": "checkpoint"} | row)
            results.advance()
        if "layers" in args.only:
            results.measuring(args.vit)
            vit, batches = random_vit(args, half.num_grads)
            # Before the prune, which leaves less of the memory.
            everything = CAPCompressor(vit, half, resources=Resources(args.vit_memory, spill_dir="none"), refits=True)
            (whole,) = everything.forecast(batches, (1,))
            own = replace(half, include=first_layers(vit, args.layers))
            row, _ = prune(vit, batches, own, args.vit_memory, args)
            row["planned_of_all_layers"] = dict(whole.seconds)
            results.add({"work": f"{args.layers} layers of {args.vit}"} | row)
            results.advance()
        if "elimination" in args.only:
            for of_vit, blocks in enumerate(args.blocks):
                results.measuring(f"{blocks} eliminations")
                found = eliminate_longest(args, bool(of_vit), half, blocks)
                results.add({"work": f"elimination of {found['blocks']} of {found['block_size']}"} | found)
            results.advance()


def random_vit(args: argparse.Namespace, num_grads: int) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    """Return a ViT and batches of noise of its size."""
    vit = make_vit(args.vit)
    side = vit.config.image_size
    return vit, make_batches(num_grads, min(args.batch_size, num_grads), side, vit.config.num_labels)


if __name__ == "__main__":
    main()
