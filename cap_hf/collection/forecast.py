"""How long the phases of a prune will take, from what the first examples cost and from blocks solved on trial."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cap_hf.collection.costs import Costs, synchronize
from cap_hf.collection.plan import Plan, sums_bytes
from cap_hf.collection.progress import Foreseen
from cap_hf.collection.resources import Afterwards
from cap_hf.collection.room import disk_seconds
from cap_hf.collection.shares import own_blocks
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.method.methods import METHODS
from cap_hf.targets import Target

# The largest block that is solved on trial; larger ones take as much longer as their size to the third power.
TRIAL_SIZE = 768


class Alike(Processes):
    """So many processes that are all like this one, for a plan of them: each says what this one says.

    Args:
        world: how many.
        device: of each.
    """

    def __init__(self, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = 0, world, device

    def gather_ints(self, *values: int) -> list[list[int]]:
        """Return these numbers, once for every process."""
        return [list(values) for _ in range(self.world)]


@dataclass(frozen=True)
class Forecast:
    """What collecting and all that follows would take in some processes.

    Attributes:
        processes: how many.
        plan: of the collection; None where nothing is summed, or nothing fits.
        seconds: of each kind of phase, of all sparsities together: collecting, eliminating, reconstructing, refitting.
        problem: why nothing fits; empty where something does.
    """

    processes: int
    plan: Plan | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


def forecast(
    plan: Plan,
    costs: Costs,
    forward: float,
    config: CAPConfig,
    processes: Processes,
    folder: Path | None,
    afterwards: Afterwards,
) -> Forecast:
    """Return the seconds of a plan by kind of phase.

    Args:
        plan, costs, config, processes, folder: as for `foresee`.
        forward: seconds of one example through the model.
        afterwards: what the collection is for.
    """
    seconds: dict[str, float] = {}
    for each in foresee(plan, costs, config, processes, folder, afterwards.prunes):
        seconds[each.kind] = seconds.get(each.kind, 0.0) + each.seconds
    if afterwards.refits:
        targets = [target for each in plan.passes for target in each]
        once = refit_seconds(targets, costs, forward, config, processes)
        seconds["refitting"] = afterwards.prunes * once
    return Forecast(processes.world, plan, seconds)


def refit_seconds(
    targets: Sequence[Target], costs: Costs, forward: float, config: CAPConfig, processes: Processes
) -> float:
    """Return the seconds of one refit: gradients that weigh positions, both models, moments, and the solving."""
    positions = {name: count / config.samples_per_grad for name, count in costs.positions.items()}
    moments = sum(
        positions.get(target.name, 0.0) * target.row_size * (target.row_size + len(target.weight)) for target in targets
    )
    backward = costs.seconds / config.samples_per_grad
    examples = config.refit_examples / processes.world
    seconds = examples * (backward + 2 * forward + moments / costs.multiplications)
    sizes = {target.row_size for target in targets}
    trials = {size: trial_seconds(config, size, targets[0].weight.device) for size in sizes}
    steps = (0, 1) if METHODS[config.method].sequential else (1,)
    rows = sum(trials[target.row_size][step] * len(target.weight) for target in targets for step in steps)
    return seconds + rows / processes.world


def foresee(
    plan: Plan, costs: Costs, config: CAPConfig, processes: Processes, folder: Path | None, prunes: int
) -> list[Foreseen]:
    """Return the phases of a collection and of so many prunes after it, in order.

    Args:
        plan: of the collection.
        costs: of a gradient sample.
        config: how to prune.
        processes: of the run.
        folder: on the disk that sums are spilled to, None where they stay in memory.
        prunes: how many sparsities are pruned to.

    Raises:
        CAPError: the folder cannot be written.
    """
    byte = 0.0 if folder is None else disk_seconds(folder)
    prior = METHODS[config.method].has_prior(config)
    sizes = {target.block_size for each in plan.passes for target in each}
    trials = {size: trial_seconds(config, size, plan.passes[0][0].weight.device) for size in sizes}
    collecting, eliminating, reconstructing = [], [], []
    for targets in plan.passes:
        own = [own_blocks(target, processes) for target in targets]
        shares = [(target, blocks.stop - blocks.start) for target, blocks in zip(targets, own, strict=True)]
        disk = byte * sum(sums_bytes(target, count, prior) for target, count in shares)
        seconds = (costs.seconds + costs.summing_seconds(targets, prior)) * config.num_grads / processes.world
        collecting.append(Foreseen("collecting", seconds + disk))
        solving = [disk + sum(trials[target.block_size][step] * count for target, count in shares) for step in (0, 1)]
        eliminating.append(solving[0])
        reconstructing.append(solving[1])
    if not plan.recollects:
        prune = Foreseen("reconstructing", sum(reconstructing))
        return [*collecting, Foreseen("eliminating", sum(eliminating)), *[prune] * prunes]
    phases = []
    for each, solving in zip(collecting, eliminating, strict=True):
        phases += [each, Foreseen("eliminating", solving)]
    for number in reversed(range(len(collecting))):
        # The second time begins with the pass that the first has ended with.
        phases += [collecting[number]] if number < len(collecting) - 1 else []
        phases.append(Foreseen("reconstructing", reconstructing[number] * prunes))
    return phases


def trial_seconds(config: CAPConfig, size: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds that a block's elimination takes, and its reconstruction with half of the weights kept."""
    method, pattern = METHODS[config.method], config.pattern
    side = min(size, TRIAL_SIZE)
    if pattern is not None:
        side = side // pattern.m * pattern.m
    count = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, side, dtype=torch.float64, generator=generator).to(device)
    fisher = torch.eye(side, dtype=torch.float64).add_(0.5 / side).to(device).expand(count, -1, -1)
    keep = torch.arange(side, device=device).expand(count, -1) % 2 == 0
    seconds = []
    for work in (
        lambda: method.eliminate(weights, fisher.contiguous(), pattern),
        lambda: method.reconstruct(weights, fisher.contiguous(), keep, config.weight_update),
    ):
        work()  # the first compiles kernels
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / count * (size / side) ** 3)
    return seconds[0], seconds[1]
