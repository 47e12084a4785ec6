"""How long the phases of a prune will take, from what the first examples cost and from blocks solved on trial."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cap_hf.collection.costs import Costs, synchronize
from cap_hf.collection.hardware import Hardware
from cap_hf.collection.pass_costs import pass_seconds, passes_again, passes_through
from cap_hf.collection.plan import Plan
from cap_hf.collection.progress import Foreseen
from cap_hf.collection.resources import Afterwards
from cap_hf.collection.room import disk_seconds
from cap_hf.collection.shares import own_blocks
from cap_hf.collection.splitting import sums_bytes
from cap_hf.collection.together import together
from cap_hf.config import CAPConfig, check_type
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.methods import METHODS
from cap_hf.targets import Target

# The largest block that is solved on trial; larger ones take as much longer as their size to the third power.
TRIAL_SIZE = 768
# Of matrices that are solved on trial at a time, where one is not larger.
TRIAL_BYTES = 2**18
# Sparsities that are solved for together on trial.
TOGETHER = 5


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


class Trials(dict[int, tuple[float, float, float]]):
    """What blocks of a size take; each size is tried once.

    That is the seconds of an elimination, of a reconstruction, and of each more sparsity that is solved for with it.

    Args:
        attempt: says them for a size, such as `trial_seconds`.
    """

    def __init__(self, attempt: Callable[[int], tuple[float, float, float]]) -> None:
        super().__init__()
        self.attempt = attempt

    def __missing__(self, size: int) -> tuple[float, float, float]:
        """Try a block of this size."""
        self[size] = self.attempt(size)
        return self[size]


@dataclass(frozen=True)
class Forecast:
    """What collecting and all that follows would take in some processes.

    Attributes:
        processes: how many.
        plan: of the collection; None where nothing is summed, or nothing fits.
        seconds: of each kind of phase, of all sparsities together: collecting, eliminating, reconstructing, refitting.
        images: how many of them each of these kinds goes through, all processes together.
        problem: why nothing fits; empty where something does.

    Raises:
        CAPError: the number of processes is none.
    """

    processes: int
    plan: Plan | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    problem: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.processes, int) or self.processes < 1:
            raise CAPError(f"a forecast for {self.processes!r} processes: pass whole numbers of at least 1")


def check_forecast(dataloader: object, processes: object, hardware: object, method: str) -> None:
    """Raise a CAPError if there can be no such forecast.

    Args:
        dataloader: none that a look at the first batch would take it from.
        processes: a sequence.
        hardware: a `Hardware`, or None.
        method: on paper only CAP is known.
    """
    check_type("processes", processes, Sequence, "pass such as (1, 2, 4, 8)")
    check_type("hardware", hardware, Hardware, "pass such as cap_hf.collection.hardware.GPUS['H100']")
    if hardware is not None and method != "cap":
        raise CAPError(f"method={method}: a plan on paper is for cap alone; a dry run without it measures any method")
    if isinstance(dataloader, Iterator):
        raise CAPError("a forecast leaves the examples to `collect`: pass a DataLoader or a list of batches")


@dataclass
class Measured:
    """What forecasts for all numbers of processes are made from.

    Attributes:
        config: how to prune, with the loss of the gradients.
        afterwards: what the collection is for.
        costs: of a gradient sample; None where nothing is summed.
        refitting: costs of an example while layers are refitted; None where they will not be.
        forward: seconds of an example through the model, without gradients.
        trials: of the blocks of the method.
        rows: of the rows that are refitted.
    """

    config: CAPConfig
    afterwards: Afterwards
    costs: Costs | None
    refitting: Costs | None
    forward: float
    trials: Trials
    rows: Trials

    def forecast(
        self, plan: Plan | None, targets: Sequence[Target], processes: Processes, folder: Path | None
    ) -> Forecast:
        """Return the forecast of a plan.

        Args:
            plan: None where nothing is summed.
            targets: that will be refitted.
            processes: of the run.
            folder: as of `foresee`.
        """
        prunes, config = self.afterwards.prunes, self.config
        seconds: dict[str, float] = {}
        images: dict[str, int] = {}
        if plan is not None and self.costs is not None:
            for each in foresee(plan, self.costs, config, processes, folder, prunes, self.trials):
                seconds[each.kind] = seconds.get(each.kind, 0.0) + each.seconds
            # Those of a search's further tries, of which `foresee` has the first.
            prior = METHODS[config.method].has_prior(config)
            more = passes_again(plan)[len(plan.passes) - 1 :]
            more_seconds = sum(
                pass_seconds(plan, number, self.costs, prior, keeping=keeping) for number, keeping in more
            )
            seconds["collecting"] += more_seconds * config.num_grads / processes.world
            images["collecting"] = passes_through(plan, self.costs) * config.num_examples
            if config.fisher_loss == "features":
                # Whose deviations are measured before.
                images["collecting"] += config.num_examples
                seconds["collecting"] += config.num_examples * self.forward / processes.world
        if self.refitting is not None:
            refits = prunes * self.afterwards.rounds
            how = (self.refitting, self.forward, config, processes, self.rows, refits)
            seconds["refitting"], images["refitting"] = refit_seconds(targets, *how), refits * config.refit_examples
        return Forecast(processes.world, plan, seconds, images)


def refit_seconds(
    targets: Sequence[Target],
    costs: Costs,
    forward: float,
    config: CAPConfig,
    processes: Processes,
    rows: Trials,
    refits: int = 1,
) -> float:
    """Return the seconds of refits: gradients that weigh positions, once; both models, moments, and the solving, each.

    Args:
        targets: whose layers are refitted.
        costs: of a gradient sample that is one example.
        forward: seconds of an example through the model.
        config: how to refit.
        processes: of the run.
        rows: seconds of a row by its size.
        refits: of one dense model, how many.
    """
    # Moments are matrix products, as fast as those of a forward pass; of the symmetric ones half is made.
    through = [(target, costs.positions.get(target.name, 0) * target.row_size) for target in targets]
    once = sum(entries * len(target.weight) for target, entries in through)
    moments = sum(entries * (target.row_size / 2 + len(target.weight)) for target, entries in through) / max(once, 1)
    seconds = config.refit_examples * (costs.seconds + refits * (2 + moments) * forward)
    steps = (0, 1) if METHODS[config.method].sequential else (1,)
    solving = sum(rows[target.row_size][step] * len(target.weight) for target in targets for step in steps)
    return (seconds + refits * solving) / processes.world


def foresee(
    plan: Plan,
    costs: Costs,
    config: CAPConfig,
    processes: Processes,
    folder: Path | None,
    prunes: int,
    trials: Trials | None = None,
) -> list[Foreseen]:
    """Return the phases of a collection and of so many prunes after it, in order.

    Args:
        plan: of the collection.
        costs: of a gradient sample.
        config: how to prune.
        processes: of the run.
        folder: on the disk that sums are spilled to, None where they stay in memory.
        prunes: how many sparsities are pruned to.
        trials: of blocks, where there are some already.

    Raises:
        CAPError: the folder cannot be written.
    """
    byte = 0.0 if folder is None else disk_seconds(folder)
    method = METHODS[config.method]
    prior = method.has_prior(config)
    device = plan.passes[0][0].weight.device
    trials = Trials(lambda size: trial_seconds(config, size, device)) if trials is None else trials
    collecting: list[Foreseen] = []
    again: list[Foreseen] = []
    eliminating, reconstructing, further = [], [], []
    for number, targets in enumerate(plan.passes):
        own = [own_blocks(target, processes) for target in targets]
        shares = [(target, blocks.stop - blocks.start) for target, blocks in zip(targets, own, strict=True)]
        disk = byte * sum(sums_bytes(target, count, prior) for target, count in shares)
        sums = prior or method.statistic == "inputs", method.statistic == "gradients"
        for found, keeping in ((collecting, number == 0), (again, False)):
            seconds = pass_seconds(plan, number, costs, *sums, keeping=keeping) * config.num_grads / processes.world
            found.append(Foreseen("collecting", seconds + disk))
        solving = [sum(trials[target.block_size][step] * count for target, count in shares) for step in range(3)]
        eliminating.append(disk + solving[0])
        reconstructing.append(disk + solving[1])
        further.append(solving[2])
    if not plan.recollects:
        most = together(plan, [target for each in plan.passes for target in each], processes, prunes, folder)
        counts = [min(most, prunes - first) for first in range(0, prunes, most)]
        # What is on the disk is read, and blocks are factorised, once for all that are solved for together.
        once, more = sum(reconstructing), sum(further)
        prune = [
            Foreseen("reconstructing", (once + more * (count - 1)) / count) for count in counts for _ in range(count)
        ]
        return [*collecting, Foreseen("eliminating", sum(eliminating)), *prune]
    phases = []
    for each, solving in zip(collecting, eliminating, strict=True):
        phases += [each, Foreseen("eliminating", solving)]
    for number in reversed(range(len(collecting))):
        # The second time begins with the pass that the first has ended with.
        phases += [again[number]] if number < len(again) - 1 else []
        phases.append(Foreseen("reconstructing", reconstructing[number] + further[number] * (prunes - 1)))
    return phases


def trial_seconds(config: CAPConfig, size: int, device: torch.device) -> tuple[float, float, float]:
    """Return the seconds of a block's elimination, of its reconstruction, and of each one more that comes with it.

    Half of the weights are kept in all of them.
    """
    method, pattern = METHODS[config.method], config.structure
    side = min(size, TRIAL_SIZE)
    if pattern is not None:
        side = side // pattern.m * pattern.m
    # Few small ones would cost their calls and little else.
    count = max(torch.get_num_threads(), TRIAL_BYTES // (8 * side**2))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, side, dtype=torch.float64, generator=generator).to(device)
    fisher = torch.eye(side, dtype=torch.float64).add_(0.5 / side).to(device).expand(count, -1, -1)
    # Every other weight stays.
    turns = torch.arange(side, device=device).expand(count, -1) % 2
    times = torch.ones(TOGETHER, count, dtype=torch.int64, device=device)

    def reconstruct(counts: torch.Tensor) -> None:
        method.reconstruct(weights, fisher.contiguous(), turns, counts, config.weight_update)

    seconds = []
    for work in (
        lambda: method.eliminate(weights, fisher.contiguous(), pattern),
        lambda: reconstruct(times[:1]),
        lambda: reconstruct(times),
    ):
        taken = []
        for _ in range(3):  # the first compiles kernels
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            taken.append(time.perf_counter() - start)
        seconds.append(min(taken) / count * (size / side) ** 3)
    eliminated, one, several = seconds
    # Never less than nothing, which noise could make of it.
    return eliminated, one, max(several - one, 0.0) / (TOGETHER - 1)
