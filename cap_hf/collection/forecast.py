"""How long the phases of a prune will take, from what the first examples cost and from blocks solved on trial."""

import time
from pathlib import Path

import torch

from cap_hf.collection.costs import Costs, synchronize
from cap_hf.collection.plan import Plan, sums_bytes
from cap_hf.collection.progress import Foreseen
from cap_hf.collection.room import disk_seconds
from cap_hf.collection.shares import own_blocks
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.method.methods import METHODS

# The largest block that is solved on trial; larger ones take as much longer as their size to the third power.
TRIAL_SIZE = 768


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
