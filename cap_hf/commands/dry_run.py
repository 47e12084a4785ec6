"""`cap-hf prune --dry_run`: what the command would take, in how many processes, without pruning anything."""

import time
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from cap_hf.collection.costs import forward_seconds
from cap_hf.collection.forecast import Forecast
from cap_hf.collection.progress import format_seconds
from cap_hf.collection.running import Batch
from cap_hf.commands.healing import HealArguments
from cap_hf.commands.tables import table
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.errors import readable
from cap_hf.method.methods import METHODS

# What kinds of phases are called in the table, in their order.
HEADINGS = {
    "collecting": "collect",
    "eliminating": "eliminate",
    "reconstructing": "reconstruct",
    "refitting": "refit",
    "healing": "heal",
    "evaluating": "evaluate",
}
# Times an image goes through the model in a step of healing: the dense one, the sparse one, and twice as much backward.
HEALING = 4
# Images that loading is timed on.
LOADED = 8


class Images(Sized, Protocol):
    """A dataset of images."""

    def __getitem__(self, index: int, /) -> Any:
        """Return an image, read and processed."""


@dataclass
class Reading:
    """How many images the phases of a prune read, and what that takes.

    Attributes:
        seconds: that reading and processing an image takes.
        workers: processes that read beside the model; 0 where it waits for them.
        counts: of images, for each kind of phase; all processes share them, but each one heals on so many.
        passes: which kinds of phases read them once for every pass.
    """

    seconds: float
    workers: int
    counts: Mapping[str, int]
    passes: Iterable[str] = ("collecting",)


def print_plan(
    compressor: CAPCompressor,
    loader: DataLoader,
    data_args: DataArguments,
    config: CAPConfig,
    heal_args: HealArguments,
    evaluated: int,
) -> None:
    """Print what a prune would take in several numbers of processes, from the first images of a loader.

    Args:
        compressor: which has collected nothing.
        loader: of calibration examples.
        data_args: for the number of processes that read images.
        config: how to prune.
        heal_args: how to heal.
        evaluated: images that one evaluation reads.
    """
    method, prunes, device = METHODS[config.method], compressor.afterwards.prunes, compressor.accelerator.device
    counts = {"evaluating": evaluated * (1 + prunes)}
    if method.statistic is not None:
        counts["collecting"] = config.num_examples
    if method.refits(config):
        counts["refitting"] = config.refit_examples * prunes
    forecasts = compressor.forecast(loader)
    model, batch = compressor.model.to(device), {name: value.to(device) for name, value in next(iter(loader)).items()}
    forwards = {"evaluating": forward_seconds(model, batch)}
    if heal_args.heal_steps:
        counts["healing"] = heal_args.num_images(1) * prunes
        forwards["healing"] = healing_seconds(model, batch, heal_args.heal_bf16)
    own: Any = loader.dataset  # has a length
    reading = Reading(reading_seconds(own), data_args.dataloader_num_workers, counts)
    seconds = [phases(each, reading, forwards) for each in forecasts]
    if compressor.accelerator.is_main_process:
        print(plan_table(forecasts, seconds))
        print("\nEach process with the memory and the speed of this one; times without loading the model and saving.")


def reading_seconds(images: Images) -> float:
    """Return the seconds that reading and processing an image takes, from the first few; they are read twice."""
    few, seconds = range(min(LOADED, len(images))), 0.0
    for _ in range(2):  # the first time, what decodes them is loaded too
        start = time.perf_counter()
        for index in few:
            _ = images[index]
        seconds = time.perf_counter() - start
    return seconds / max(1, len(few))


def healing_seconds(model: nn.Module, batch: Batch, bf16: bool) -> float:
    """Return the seconds that healing takes for an image, in bfloat16 mixed precision or not."""
    with torch.autocast(batch["pixel_values"].device.type, torch.bfloat16, enabled=bf16):
        return HEALING * forward_seconds(model, batch)


def phases(forecast: Forecast, reading: Reading, forwards: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each kind of phase of a prune, in their order; none that takes no time.

    Args:
        forecast: of collecting and solving.
        reading: the images of all kinds of phases.
        forwards: seconds that an image takes in the model, of those kinds that are not in the forecast.
    """
    found = dict(forecast.seconds)
    for kind, count in reading.counts.items():
        own = count if kind == "healing" else count / forecast.processes
        times = forecast.plan.num_passes if forecast.plan is not None and kind in reading.passes else 1
        model, read = found.get(kind, 0.0) + own * forwards.get(kind, 0.0), own * times * reading.seconds
        found[kind] = max(model, read / reading.workers) if reading.workers else model + read
    return {kind: found[kind] for kind in HEADINGS if found.get(kind)}


def plan_table(forecasts: Sequence[Forecast], seconds: Sequence[Mapping[str, float]]) -> str:
    """Return a line for each forecast with the seconds of its phases, and below why nothing fits where that is so."""
    fitting = [(each, taken) for each, taken in zip(forecasts, seconds, strict=True) if not each.problem]
    kinds = [kind for kind in HEADINGS if any(kind in taken for _, taken in fitting)]
    lines = []
    for each, taken in fitting:
        plan = ["-", "-", "-", "-"]
        if each.plan is not None:
            blocks = str(each.plan.block_size)
            disk = readable(each.plan.spilled) if each.plan.spilled else "-"
            memory = readable(each.plan.needed) if each.plan.needed else "-"
            plan = [str(each.plan.num_passes), blocks, memory, disk]
        times = [format_seconds(taken.get(kind, 0.0)) for kind in kinds]
        lines.append([str(each.processes), *plan, *times, format_seconds(sum(taken.values()))])
    header = ["processes", "passes", "blocks", "memory", "disk", *(HEADINGS[kind] for kind in kinds), "together"]
    problems = [f"{each.processes}: {each.problem}" for each in forecasts if each.problem]
    return "\n".join([*([table(header, lines)] if lines else []), *problems])
