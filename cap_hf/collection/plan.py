"""How a collection fits into memory: which targets in which pass over the examples, and how many examples a step."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from cap_hf.collection import solver
from cap_hf.collection.costs import Costs
from cap_hf.collection.resources import Resources
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method import fisher
from cap_hf.targets import Target

# Of the memory that is free, what is planned with: allocators and other programs need some.
HEAD_ROOM = 0.85
# Of the widest activation on a CPU: what the samples that go through a model together fit into, so that a layer finds
# in the cache what the one before it has left there.
CACHED_BYTES = 8 * 2**20
# Written to the disk to see how fast it is.
TRIAL_BYTES = 32 * 2**20
# What is tried where a block size has to be found, largest first.
BLOCK_SIZES = ("row", 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16)


@dataclass
class Plan:
    """Which targets are collected in which pass.

    Attributes:
        passes: the targets of each, in the model's order.
        block_size: that they were found with.
        limit: gradient samples a step.
        at_a_time: of them, that go through the model at a time.
        available: bytes beyond those in use before.
        needed: of them, at the peak.
        sums: bytes of this process's Fisher sums, of all passes.
        spilled: bytes that go to the disk; 0 for a single pass.
    """

    passes: list[list[Target]]
    block_size: int | str
    limit: int
    at_a_time: int
    available: int = 0
    needed: int = 0
    sums: int = 0
    spilled: int = 0

    def to_dict(self) -> dict:
        """What another run needs to go through memory in the same way."""
        passes = [[target.name for target in each] for each in self.passes]
        spills = bool(self.spilled)
        steps = {"limit": self.limit, "at_a_time": self.at_a_time}
        return {"passes": passes, "block_size": self.block_size, "spills": spills} | steps

    def like(self, other: dict, find: Callable[[int | str], list[Target]]) -> "Plan":
        """This plan with the passes of another one, as `to_dict` gave them."""
        targets = {target.name: target for target in find(other["block_size"])}
        passes = [[targets[name] for name in each] for each in other["passes"]]
        spilled = max(self.spilled, 1) if other["spills"] else 0
        steps = {name: other[name] for name in ("block_size", "limit", "at_a_time")}
        return replace(self, passes=passes, spilled=spilled, **steps)

    def describe(self, seconds: float, folder: Path | None) -> str:
        """One line; `seconds` are what the passes are expected to take."""
        passes = "one pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        disk = f", {gigabytes(self.spilled)} kept in {folder}" if self.spilled else ""
        return (
            f"Plan: {passes} over the examples in about {seconds:.0f} s, {self.limit} a step; a process has "
            f"{gigabytes(self.sums)} of Fisher sums and takes {gigabytes(self.needed)} of the "
            f"{gigabytes(self.available)} that it may{disk}"
        )


def plan_passes(
    targets: Sequence[Target],
    block_size: int | str,
    available: int,
    costs: Costs,
    processes: Processes,
    max_passes: int | None = None,
) -> Plan | None:
    """The plan with the fewest passes; None where the memory or `max_passes` does not allow any.

    Args:
        targets: in the model's order.
        block_size: that they were found with.
        available: bytes beyond those in use.
        costs: of a gradient sample.
        processes: that share the blocks.
        max_passes: over the examples, or None for any number.
    """
    own = sum(own_weights(target, processes) for target in targets)
    largest = max(own_weights(target, processes) for target in targets)
    sizes = [sums_bytes(target, processes) for target in targets]
    limit = costs.samples
    while limit > 1 and in_model(limit, costs, processes.device) > available // 2:
        limit //= 2
    # A piece of every process: as it is made, and twice each as it is sent and as it is received.
    piece = max(piece_weights(target) for target in targets) * processes.world * limit * 4
    collecting = in_model(limit, costs, processes.device) + 5 * piece
    at_a_time = samples_at_a_time(limit, costs, processes.device)
    solving = solver.CHUNK_COPIES * max(solver.CHUNK_BYTES, *(8 * target.block_size**2 for target in targets))
    # A target's losses are compared in float64.
    solving += 24 * largest
    # Weights, order, losses, and what the losses are compared by, or the new weights.
    needed = sum(sizes) + 14 * own + max(collecting, solving)
    if needed <= available:
        return Plan([list(targets)], block_size, limit, at_a_time, available, needed, sum(sizes), 0)
    # All these are on the disk then, except for what the losses are compared by.
    room = available - collecting
    after = max(sizes) + solving + 4 * own
    if max(sizes) > room or after > available:
        return None
    passes: list[list[Target]] = [[]]
    held = 0
    for target, size in zip(targets, sizes, strict=True):
        if passes[-1] and held + size > room:
            passes.append([])
            held = 0
        passes[-1].append(target)
        held += size
    if max_passes is not None and len(passes) > max_passes:
        return None
    # One pass would do for the sums alone, but not for what is kept beside them: then that goes to the disk.
    peak = max(sum(sums_bytes(target, processes) for target in each) for each in passes) + collecting
    return Plan(passes, block_size, limit, at_a_time, available, max(peak, after), sum(sizes), sum(sizes) + 14 * own)


def samples_at_a_time(limit: int, costs: Costs, device: torch.device) -> int:
    """How many of a step's `limit` gradient samples go through the model at a time."""
    if device.type != "cpu":
        return limit
    # The same for every machine, because results depend on it by rounding.
    return max(1, min(limit, CACHED_BYTES // max(costs.widest, 1)))


def in_model(limit: int, costs: Costs, device: torch.device) -> int:
    """Bytes of a step's `limit` gradient samples."""
    at_a_time = samples_at_a_time(limit, costs, device)
    return costs.bytes * at_a_time + (costs.kept * limit if at_a_time < limit else 0)


def make_plan(
    find: Callable[[int | str], list[Target]],
    block_size: int | str,
    resources: Resources,
    costs: Costs,
    processes: Processes,
) -> Plan:
    """The plan for a block size, or for the largest that the memory allows (`auto`); the same on every process.

    Args:
        find: gives the targets for a block size.
        block_size: a number, 'row' or 'auto'.
        resources: what may be used.
        costs: of a gradient sample, on this process.
        processes: of the run.

    Raises:
        CAPError: nothing fits; says what would.
    """
    everyone = processes.gather_ints(
        available_bytes(resources, processes.device), costs.samples, costs.bytes, costs.kept, costs.widest
    )
    available = min(each[0] for each in everyone)
    costs = Costs(*(max(values) for values in list(zip(*everyone, strict=True))[1:]))
    most = resources.max_passes
    if block_size == "auto" and most is None:
        most = 1
    for size in BLOCK_SIZES if block_size == "auto" else (block_size,):
        plan = plan_passes(find(size), size, available, costs, processes, most)
        if plan is not None:
            check_disk(plan, resources)
            return plan
    would = next(
        (size for size in BLOCK_SIZES if plan_passes(find(size), size, available, costs, processes, most)), None
    )
    advice = "prune fewer targets at a time with --include, or take a smaller batch size"
    if would is not None:
        advice = f"--fisher_block_size {would} would do"
    wish = "any Fisher" if block_size == "auto" else f"the Fisher with fisher_block_size={block_size}"
    needed = sum(
        sums_bytes(target, processes) for target in find(BLOCK_SIZES[-1] if block_size == "auto" else block_size)
    )
    passes = "" if most is None else f" in {most} pass{'es' if most > 1 else ''}"
    raise CAPError(
        f"{wish} ({gigabytes(needed)}) does not fit into the {gigabytes(max(available, 0))} that are free{passes}: "
        f"{advice}"
    )


def own_weights(target: Target, processes: Processes) -> int:
    """The most weights of a target that a process owns."""
    shares = fisher.block_shares(target, processes)
    return max(share.stop - share.start for share in shares) * target.block_size


def piece_weights(target: Target) -> int:
    """The most weights whose gradients are made at a time for one process."""
    return max(piece.stop - piece.start for piece in fisher.row_pieces(target)) * target.row_size


def sums_bytes(target: Target, processes: Processes) -> int:
    """The most bytes of a target's Fisher sums that a process owns."""
    width = torch.promote_types(target.weight.dtype, torch.float32).itemsize
    return own_weights(target, processes) // target.block_size * fisher.sums_per_block(target.block_size) * width


def available_bytes(resources: Resources, device: torch.device) -> int:
    """How many bytes more this process may take."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    else:
        used = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = int(free * HEAD_ROOM)
    return free if resources.bytes is None else min(free, resources.bytes - used)


def check_disk(plan: Plan, resources: Resources) -> None:
    """Raise a CAPError if the disk has no room for what a plan spills."""
    if not plan.spilled:
        return
    folder = spill_folder(resources)
    needed = plan.spilled * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CAPError(
            f"{len(plan.passes)} passes keep {gigabytes(needed)} in {folder}, where {gigabytes(free)} are free: name "
            "another folder with --spill_dir, or take a smaller --fisher_block_size"
        )


def disk_seconds(plan: Plan, folder: Path) -> float:
    """What it takes to write what a plan spills to a folder's disk and to read it again, from a short trial.

    Raises:
        CAPError: the folder cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
            return 2 * plan.spilled / TRIAL_BYTES * (time.perf_counter() - start)
    except OSError as error:
        raise CAPError(f"--spill_dir {folder} cannot be written: {error.strerror}") from error


def spill_folder(resources: Resources) -> Path:
    """The folder for what goes to the disk.

    Raises:
        CAPError: it cannot be made.
    """
    folder = Path(resources.spill_dir or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CAPError(f"--spill_dir {folder} cannot be made: {error.strerror}") from error
    return folder


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
