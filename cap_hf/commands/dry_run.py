"""`cap-hf prune --dry_run`: what the command would take, in how many processes, without pruning anything."""

import time
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader

from cap_hf.collection.batch_norm import NUM_EXAMPLES
from cap_hf.collection.clock import REACHED, READ, Clock, PaperClock
from cap_hf.collection.forecast import Forecast
from cap_hf.collection.hardware import WORLDS, parse_hardware
from cap_hf.collection.progress import format_seconds
from cap_hf.commands.budgeting import ways_to
from cap_hf.commands.healing import HealArguments
from cap_hf.commands.prune_arguments import Asked
from cap_hf.commands.tables import table
from cap_hf.compressor import CAPCompressor
from cap_hf.data.arguments import DataArguments
from cap_hf.data.workers import num_workers
from cap_hf.errors import readable
from cap_hf.stepwise import start_of

if TYPE_CHECKING:
    from cap_hf.commands.preparing import Run

# What kinds of phases are called in the table, in their order.
HEADINGS = {
    "collecting": "collect",
    "eliminating": "eliminate",
    "reconstructing": "reconstruct",
    "refitting": "refit",
    "recalibrating": "batch norm",
    "healing": "heal",
    "evaluating": "evaluate",
}
# Times an image goes through the model in a step of healing: the dense one, the sparse one, and twice as much backward.
HEALING = 4
# What the table leaves out.
NOTE = (
    "Memory and disk are those of each process, beside the model, and each is taken to have the memory and the speed\n"
    "of this one. Loading the model, probes of features and saving come on top."
)
PAPER = (
    f"On paper: each process has one {{}},\nof which {REACHED:.0%} of the arithmetic and {READ:.0%} of the memory's "
    "speed are taken to be reached, and no disk; nothing was\nmeasured there. Memory is that of each process, beside "
    "the model. Images are read as on one machine like this. What processes\nsend each other, loading the model, "
    "probes of features and saving come on top."
)
# Images that loading is timed on.
LOADED = 8


class Images(Sized, Protocol):
    """A dataset of images."""

    def __getitem__(self, index: int, /) -> Any:
        """Return an image, read and processed."""


@dataclass
class Reading:
    """What reading images takes.

    Attributes:
        seconds: that reading and processing an image takes.
        workers: processes that read beside the model; 0 where it waits for them.
    """

    seconds: float
    workers: int


@dataclass
class Phase:
    """A kind of phase that is in no forecast of the compressor.

    Attributes:
        images: how many it goes through: all processes together, or each of them.
        seconds: that an image takes in the model.
        each: whether every process goes through as many.
    """

    images: int
    seconds: float
    each: bool = False


@dataclass
class Counts:
    """How often what a prune does is done.

    Attributes:
        sparsities: that are pruned to.
        collections: of gradients, each with a prune and a refit for all sparsities of the compressor's own plan.
        evaluated: images that one evaluation reads.
        recalibrates: whether batch norm is estimated anew.
        trials: models that are pruned and measured to find one sparsity; 0 where none is searched for.
        searched: images that are read to measure one of them.
    """

    sparsities: int
    collections: int
    evaluated: int
    recalibrates: bool
    trials: int = 0
    searched: int = 0

    @classmethod
    def of(cls, run: "Run", asked: Asked) -> "Counts":
        """Return the counts of a run."""
        recomputations, start = asked.prune.num_recomputations, start_of(run.compressor)
        collections = sum(map(len, ways_to(asked.sparsities, recomputations, start)))
        sparsities = max(1, len(asked.sparsities))
        counts = cls(sparsities, collections if recomputations else 1, run.evaluated, run.recalibrates)
        if run.held_out is None:
            return counts
        return replace(counts, trials=asked.search.most_evaluations, searched=run.held_out.num_read)


def print_plan(
    compressor: CAPCompressor,
    loader: DataLoader,
    data_args: DataArguments,
    heal_args: HealArguments,
    counts: Counts,
    plan_for: str | None = None,
) -> None:
    """Print what a prune would take in several numbers of processes, from the first images of a loader.

    Args:
        compressor: which has collected nothing.
        loader: of calibration examples.
        data_args: for the number of processes that read images.
        heal_args: how to heal.
        counts: how often what is done.
        plan_for: a GPU that is not there, and how many of them, as `parse_hardware` takes it; None for this machine.
    """
    hardware, worlds = (None, WORLDS) if plan_for is None else parse_hardware(plan_for)
    forecasts = compressor.forecast(loader, worlds, hardware)
    forecasts = [repeated(each, counts.collections) for each in forecasts]
    forecasts = [repeated(each, max(1, counts.trials), ("reconstructing",)) for each in forecasts]
    prunes, device = counts.sparsities, compressor.accelerator.device
    clock = Clock(device) if hardware is None else PaperClock(hardware)
    model, batch = compressor.model.to(device), {name: value.to(device) for name, value in next(iter(loader)).items()}
    forward = clock.forward(model, batch)
    measured = counts.evaluated * (1 + prunes) + counts.searched * (1 + counts.trials)
    after = {"evaluating": Phase(measured, forward)}
    if counts.recalibrates:
        after["recalibrating"] = Phase(NUM_EXAMPLES * max(prunes, counts.collections, counts.trials), forward)
    if heal_args.heal_steps:
        dtype = torch.bfloat16 if heal_args.heal_bf16 else None
        step = HEALING * clock.forward(model, batch, dtype)
        after["healing"] = Phase(heal_args.num_images(1) * prunes, step, each=True)
    own: Any = loader.dataset  # has a length
    image, wish = reading_seconds(own), data_args.dataloader_num_workers
    readings = [Reading(image, num_workers(wish, clock.device, each.processes)) for each in forecasts]
    seconds = [phases(each, reading, after) for each, reading in zip(forecasts, readings, strict=True)]
    if compressor.accelerator.is_main_process:
        print(plan_table(forecasts, seconds, NOTE if hardware is None else PAPER.format(hardware.describe())))


def repeated(forecast: Forecast, times: int, kinds: Collection[str] = tuple(HEADINGS)) -> Forecast:
    """Return a forecast of doing so often what another one is of, or these kinds of its phases."""
    seconds = {kind: each * (times if kind in kinds else 1) for kind, each in forecast.seconds.items()}
    images = {kind: each * (times if kind in kinds else 1) for kind, each in forecast.images.items()}
    return replace(forecast, seconds=seconds, images=images)


def reading_seconds(images: Images) -> float:
    """Return the seconds that reading and processing an image takes, from the first few; they are read twice."""
    few, seconds = range(min(LOADED, len(images))), 0.0
    for _ in range(2):  # the first time, what decodes them is loaded too
        start = time.perf_counter()
        for index in few:
            _ = images[index]
        seconds = time.perf_counter() - start
    return seconds / max(1, len(few))


def phases(forecast: Forecast, reading: Reading, after: Mapping[str, Phase]) -> dict[str, float]:
    """Return the seconds of each kind of phase of a prune, in their order; none that takes no time.

    Args:
        forecast: of collecting and all that the compressor does.
        reading: of images.
        after: what else there is, by kind.
    """
    found = dict(forecast.seconds)
    images = {kind: count / forecast.processes for kind, count in forecast.images.items()}
    for kind, phase in after.items():
        images[kind] = phase.images if phase.each else phase.images / forecast.processes
        found[kind] = images[kind] * phase.seconds
    for kind, count in images.items():
        read = count * reading.seconds
        found[kind] = max(found[kind], read / reading.workers) if reading.workers else found[kind] + read
    return {kind: found[kind] for kind in HEADINGS if found.get(kind)}


def plan_table(forecasts: Sequence[Forecast], seconds: Sequence[Mapping[str, float]], note: str = NOTE) -> str:
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
    # Each text once, with all numbers of processes that it is of.
    problems: dict[str, list[str]] = {}
    for each in forecasts:
        if each.problem:
            problems.setdefault(each.problem, []).append(str(each.processes))
    below = [
        f"with {' or '.join(counts)} process{'es' * (counts != ['1'])}: {text}" for text, counts in problems.items()
    ]
    return "\n".join([*([table(header, lines), "", note] if lines else []), *below])
