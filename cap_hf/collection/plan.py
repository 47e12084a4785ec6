"""How a collection fits into memory: which targets in which pass, and how many gradient samples at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cap_hf.collection import exchange, removal_paths, solver
from cap_hf.collection.costs import Costs
from cap_hf.collection.shares import chunk_blocks, largest_shares
from cap_hf.collection.splitting import Piece, in_parts, split_keeping, sums_bytes
from cap_hf.distributed.processes import Processes
from cap_hf.errors import readable
from cap_hf.method import gradients
from cap_hf.targets import Target

# Of the widest activation on a CPU: what a microbatch fits into, so that a layer finds in the cache what the one before
# it has left there. The same for every machine, because results depend on it by rounding.
CACHED_BYTES = 8 * 2**20
# Of what autograd keeps on other devices: what a microbatch fits into; the same for every machine too.
DEVICE_MICROBATCH_BYTES = 4 * 2**30
Find = Callable[[int | str], list[Target]]


@dataclass
class Plan:
    """Which targets are collected in which pass.

    Attributes:
        passes: the targets of each, in the model's order; of one whose sums alone are too large, a part.
        block_size: that they were found with.
        step: gradient samples of a step, at most; larger batches are split.
        microbatch: how many of them go through the model together.
        available: bytes that may be taken beside those in use before.
        needed: how many of them are, at the peak.
        sums: bytes of this process's Fisher sums, of all passes.
        spilled: bytes that go to the disk; 0 for a single pass.
        batch_bytes: of the matrices that are solved at a time.
        recollects: whether the sums of a pass are dropped before the next, and collected anew when they are wanted.
        keeps: of every how many layers hidden states are kept between passes, which then go through few layers alone;
            0 for none.
        rounds: how often new weights are made, of several sparsities together.
    """

    passes: list[list[Target]]
    block_size: int | str
    step: int
    microbatch: int
    available: int = 0
    needed: int = 0
    sums: int = 0
    spilled: int = 0
    batch_bytes: int | None = None
    recollects: bool = False
    keeps: int = 0
    rounds: int = 1

    @property
    def targets(self) -> list[Target]:
        """Return the targets of all passes, whole, in the model's order."""
        return list({target.name: target.whole for each in self.passes for target in each}.values())

    @property
    def num_passes(self) -> int:
        """Return how often the examples are gone through, for paths and for new weights."""
        # The second time begins with the pass that the first has ended with; after it nothing is kept.
        return (1 + self.rounds) * len(self.passes) - 1 if self.recollects else len(self.passes)

    def to_dict(self) -> dict:
        """Return what another run needs to go through memory in the same way."""
        # A name alone is that of a whole target.
        passes = [
            [target.name if target.whole is target else [target.name, *target.part] for target in each]
            for each in self.passes
        ]
        steps = {"step": self.step, "microbatch": self.microbatch}
        keeping = {"spills": bool(self.spilled), "recollects": self.recollects, "keeps": self.keeps}
        return {"passes": passes, "block_size": self.block_size} | keeping | steps

    def like(self, other: dict, find: Find) -> "Plan":
        """Return this plan with the passes of another one, as `to_dict` gave them."""
        targets = {target.name: target for target in find(other["block_size"])}
        named = [[(each, 0, 1) if isinstance(each, str) else each for each in group] for group in other["passes"]]
        passes = [[replace(targets[name], part=(number, count)) for name, number, count in each] for each in named]
        spilled = max(self.spilled, 1) if other["spills"] else 0
        same = {name: other[name] for name in ("block_size", "step", "microbatch")}
        # An older state does not say what was not there yet.
        ways = {name: other.get(name, 0) for name in ("recollects", "keeps")}
        return replace(self, passes=passes, spilled=spilled, **ways, **same)

    def describe(self, seconds: float, folder: Path | None) -> str:
        """Return one line about the plan; `seconds` are what the passes are expected to take."""
        passes = "one pass" if self.num_passes == 1 else f"{self.num_passes} passes"
        if self.keeps:
            passes += ", most of them through few layers alone,"
        blocks = "blocks of a row" if self.block_size == "row" else f"blocks of about {self.block_size}"
        disk = f", {readable(self.spilled)} kept in {folder}" if self.spilled else ""
        return (
            f"Plan: {passes} over the examples in about {seconds:.0f} s, {blocks}, {self.step} gradient samples per "
            f"step; each process has {readable(self.sums)} of Fisher sums and takes {readable(self.needed)} of the "
            f"{readable(self.available)} that it may{disk}"
        )


def plan_passes(
    targets: Sequence[Target],
    block_size: int | str,
    available: int,
    costs: Costs,
    processes: Processes,
    max_passes: int | None = None,
    dtype: torch.dtype = torch.float32,
    prior: bool = False,
    refitting: int = 0,
    recollected: int = 0,
    kept: int = 0,
    rounds: int = 1,
    stride: int = 1,
) -> Plan | None:
    """Return the plan with the fewest passes; None where the memory or `max_passes` does not allow any.

    What does not fit into one pass goes to the disk, or is collected twice. What goes to the disk is read target by
    target; of what is collected twice a pass may take parts of a target.

    Args:
        targets: in the model's order.
        block_size: that they were found with.
        available: bytes beyond those in use.
        costs: of a gradient sample.
        processes: that share the blocks.
        max_passes: over the examples, or None for any number.
        dtype: what gradients are rounded to.
        prior: whether inputs are summed too.
        refitting: bytes that a refit afterwards takes at the least, beside the sums of one pass.
        recollected: where sums are dropped and collected anew, how many sparsities are pruned to together; 0 for sums
            that go to the disk.
        kept: of how many gradient samples hidden states are kept between passes; 0 for none. Where sums are collected
            anew alone.
        rounds: how often new weights are made.
        stride: of every how many layers hidden states are kept.
    """
    device = processes.device
    blocks = largest_shares(list(targets), processes)
    shares = list(zip(targets, blocks, strict=True))
    sizes = [sums_bytes(target, count, prior) for target, count in shares]
    held, compared = (
        sum(part(target, count) for target, count in shares)
        for part in (removal_paths.held_bytes, removal_paths.compared_bytes)
    )

    def in_step(step: int, kept: int) -> int:
        """Return the bytes that are kept of a step's samples, of so many each; none where all are summed at once."""
        return kept * step if microbatch_of(step, costs, device) < step else 0

    def largest_step(kept: int) -> int:
        """Return the largest step that takes no more than half of the memory, of samples that keep so many bytes."""
        step = costs.samples
        while step > 1 and in_model_bytes(step, costs, device) + in_step(step, kept) > available // 2:
            step //= 2
        return step

    def collecting_bytes(step: int) -> int:
        """Return the bytes that a step takes, beside what is kept of it."""
        exchanged = max(exchange.peak_bytes(target, processes, step, dtype) for target in targets)
        return in_model_bytes(step, costs, device) + exchanged

    paths = max(removal_paths.peak_bytes(target, count) for target, count in shares)

    least, most = solver.batch_range(targets, device, available)

    def fit(beside: int, most: int) -> tuple[int, int]:
        """Return how large batches are that fit beside what else is there, and what they take with the paths.

        No larger ones than of `most` bytes, but on a CPU no smaller ones than are fast.
        """
        batch_bytes = max(0, min(most, (available - beside - paths) // solver.COPIES))
        if device.type == "cpu":
            batch_bytes = max(batch_bytes, least)
        return batch_bytes, solver.peak_bytes(targets, batch_bytes) + paths

    beside, step = sum(sizes) + held + compared, largest_step(costs.kept)
    collecting = collecting_bytes(step) + in_step(step, costs.kept)
    if beside + max(collecting, fit(beside, least)[1], refitting) <= available:
        batch_bytes, solving = fit(beside, most)
        needed = beside + max(collecting, solving, refitting)
        ways = (step, microbatch_of(step, costs, device))
        return Plan([list(targets)], block_size, *ways, available, needed, sum(sizes), 0, batch_bytes)

    def several(step: int) -> Plan | None:
        """Return the plan of several passes for a step; of the targets of a pass alone something is kept of it."""
        collecting = collecting_bytes(step)
        kept_of = {each.name: in_step(step, costs.kept_of.get(each.name, 0)) for each in targets}

        def pieces(room: int) -> list[Piece]:
            """Return the targets in pieces that each fit into some room, with what is kept; none where one cannot."""
            cut = []
            for target, size in zip(targets, sizes, strict=True):
                own = kept_of[target.name]
                found = [(target, size)]
                if size + own > room:
                    found = in_parts(target, room - own, processes, prior) if recollected else []
                if not found:
                    return []
                cut += [(part, bytes_ + own) for part, bytes_ in found]
            return cut

        beside = held
        if recollected:
            # New weights of all sparsities are in memory, the model as it was and as it is, and beside the last pass's
            # sums what losses are compared by.
            beside += 2 * costs.model
            beside += recollected * sum(
                target.block_size * count * target.weight.element_size() for target, count in shares
            )
            smallest = max(sums_bytes(target, chunk_blocks(target, device), prior) for target in targets)
            _, solving = fit(smallest + beside + compared, least)
            room = available - beside - max(collecting, solving + compared)
            after = beside + refitting
        else:
            # All these are on the disk then, except for what the losses are compared by.
            _, solving = fit(max(sizes) + compared, least)
            room = available - collecting
            after = max(max(sizes) + solving, refitting) + compared
        if after > available:
            return None
        found = split_keeping(pieces, room, costs.chains if kept else [], kept, stride)
        if found is None or (kept and not found[1]):
            return None
        passes, states = found
        beside += states
        largest = max(sum(size for _, size in each) for each in passes)
        # Passes are as few as small batches allow; larger ones take what is left then.
        if recollected:
            batch_bytes, solving = fit(largest + beside + compared, most)
            peak = largest + beside + max(collecting, solving + compared)
        else:
            batch_bytes, solving = fit(max(sizes) + compared, most)
            peak, after = largest + collecting, max(max(sizes) + solving, refitting) + compared
        plan = Plan(
            [[target for target, _ in each] for each in passes],
            block_size,
            step,
            microbatch_of(step, costs, device),
            available,
            needed=max(peak, after),
            sums=sum(sizes),
            # One pass may do for the sums alone, but not for what is kept beside them: then that goes to the disk.
            spilled=0 if recollected else sum(sizes) + beside,
            batch_bytes=batch_bytes,
            recollects=bool(recollected),
            keeps=stride if kept else 0,
            rounds=rounds,
        )
        return plan if max_passes is None or plan.num_passes <= max_passes else None

    # Of smaller steps less is kept, which leaves room for more sums; of those with as few passes the largest is taken.
    steps = [largest_step(max(costs.kept_of.values(), default=0))]
    while steps[-1] > microbatch_of(steps[-1], costs, device):
        steps.append(steps[-1] // 2)
    plans = [plan for plan in map(several, steps) if plan is not None]
    return min(plans, key=lambda plan: len(plan.passes), default=None)


def microbatch_of(step: int, costs: Costs, device: torch.device) -> int:
    """Return how many of a step's gradient samples go through the model together."""
    if device.type == "cpu":
        fitting = CACHED_BYTES // max(costs.widest, 1)
    else:
        fitting = DEVICE_MICROBATCH_BYTES // max(costs.bytes, 1)
    return max(1, min(step, fitting))


def in_model_bytes(step: int, costs: Costs, device: torch.device) -> int:
    """Return the bytes of a step's gradient samples, beside what is kept of them until they are summed."""
    making = gradients.making_bytes(costs.patches)
    return costs.bytes * microbatch_of(step, costs, device) + costs.held * step + making
