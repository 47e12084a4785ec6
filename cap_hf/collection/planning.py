"""The plan of a collection: how large its blocks are, and whether what does not fit is kept or collected twice."""

import math
from dataclasses import replace

import torch

from cap_hf.collection import solver
from cap_hf.collection.costs import Costs
from cap_hf.collection.fitting import least_bytes
from cap_hf.collection.pass_costs import pass_seconds, passes_again
from cap_hf.collection.plan import Find, Plan, plan_passes
from cap_hf.collection.resources import Afterwards, Resources
from cap_hf.collection.room import available_bytes, check_disk, disk_seconds, spill_folder
from cap_hf.collection.shares import largest_shares
from cap_hf.collection.splitting import sums_bytes
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError, readable
from cap_hf.method.methods import METHODS

# What is tried where a block size has to be found, largest first.
BLOCK_SIZES = ("row", 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16)
# Of every how many layers hidden states are kept, tried in turn.
STRIDES = (1, 2, 3, 4, 6, 8, 12)
# Where it has to be found, no block is larger than this if all blocks together would take more than so much work (see
# `solver.work_of`): on two cores a few minutes. Larger blocks cost with the square of their size, and once layers are
# refitted they gain little (docs/results.md).
USUAL_SIZE, MOST_WORK = 192, 1e12


def make_plan(
    find: Find,
    config: CAPConfig,
    resources: Resources,
    costs: Costs,
    processes: Processes,
    afterwards: Afterwards,
    available: int | None = None,
    shared: bool = True,
) -> Plan:
    """Return the plan for a block size, or for the largest that the memory allows (`auto`), the same on every process.

    Args:
        find: gives the targets for a block size.
        config: how to prune, by a method that sums gradients.
        resources: what may be used.
        costs: of a gradient sample, on this process.
        processes: of the run.
        afterwards: what the collection is for.
        available: bytes that this process may take beside the model; None to look.
        shared: whether the processes share one dataloader, and do not have examples of their own.

    Raises:
        CAPError: nothing fits; says what would.
    """
    method = METHODS[config.method]
    block_size, prior = method.block_size(config), method.has_prior(config)
    dtype = getattr(torch, config.fisher_dtype)
    sizes = ("samples", "bytes", "kept", "widest", "patches", "held", "model")
    own = available_bytes(resources, processes.device) if available is None else available
    names = [target.name for target in find("row")]
    said = (*(getattr(costs, name) for name in sizes), *(costs.kept_of.get(name, 0) for name in names))
    everyone = list(zip(*processes.gather_ints(own, *said), strict=True))
    available, largest = min(everyone[0]), [max(values) for values in everyone[1:]]
    kept_of = dict(zip(names, largest[len(sizes) :], strict=True))
    costs = replace(costs, kept_of=kept_of, **dict(zip(sizes, largest, strict=False)))
    most = resources.max_passes
    # A process takes whole batches, so one may have more than its share.
    kept = config.num_grads
    if shared and costs.samples:
        kept = min(kept, math.ceil(config.num_grads / (processes.world * costs.samples)) * costs.samples)

    def plan(size: int | str, most: int | None, refits: bool = afterwards.refits) -> Plan | None:
        # A refit gets by with fewer examples than are asked for, but not with fewer than so many.
        refitting = least_bytes(costs.widest // config.samples_per_grad) if refits else 0
        how, rounds = (size, available, costs, processes, most, dtype, prior, refitting), afterwards.rounds
        spilling, anew = (plan_passes(find(size), *how, prunes, 0, rounds) for prunes in (0, afterwards.prunes))
        # Where states are kept there is less room.
        ways = [] if anew is None else strides(costs)
        keeping = (plan_passes(find(size), *how, afterwards.prunes, kept, rounds, stride) for stride in ways)
        if spilling is not None and not spilling.spilled:
            return spilling
        plans = [each for each in (anew, *keeping) if each is not None]
        byte = 0.0
        if spilling is not None and not resources.spills_nothing:
            seconds_per_byte = disk_speed(spilling, resources, processes) if plans else 0.0
            if seconds_per_byte is not None:
                plans, byte = [spilling, *plans], seconds_per_byte
        if len(plans) < 2:
            return next(iter(plans), None)
        return min(
            plans, key=lambda each: extra_seconds(each, costs, processes, byte, prior, afterwards.prunes, config)
        )

    tries = [(block_size, most)]
    if block_size == "auto":
        # In one pass, unless somebody asks for more of them, or nothing fits into one.
        automatic = automatic_sizes(find)
        tries = [(size, limit) for limit in ((1, None) if most is None else (most,)) for size in automatic]
    for size, limit in tries:
        found = plan(size, limit)
        if found is not None:
            check_disk(found.spilled, len(found.passes), resources)
            return found
    advice = "prune fewer targets at a time with --include, or take a smaller batch size"
    more = [plan(size, None) for size, _ in tries] if most is not None else []
    would = next((size for size in BLOCK_SIZES if plan(size, most)), None)
    if afterwards.refits and any(plan(size, limit, refits=False) for size, limit in tries):
        advice = "it would with --refit false, which takes no memory afterwards"
    elif any(more):
        advice = f"--max_passes {min(each.num_passes for each in more if each)} would do"
    elif would is not None:
        advice = f"--fisher_block_size {would} would do"
    wish = "any Fisher" if block_size == "auto" else f"the Fisher with fisher_block_size={block_size}"
    targets = find(BLOCK_SIZES[-1] if block_size == "auto" else block_size)
    shares = largest_shares(targets, processes)
    needed = sum(sums_bytes(target, blocks, prior) for target, blocks in zip(targets, shares, strict=True))
    passes = "" if most is None else f" in {most} pass{'es' if most > 1 else ''}"
    raise CAPError(
        f"{wish} ({readable(needed)}) does not fit into the {readable(max(available, 0))} that are free{passes}: "
        f"{advice}"
    )


def disk_speed(plan: Plan, resources: Resources, processes: Processes) -> float | None:
    """Return the seconds that writing a byte takes, of the slowest process; None where one has no room for a plan."""
    try:
        check_disk(plan.spilled, len(plan.passes), resources)
        seconds = int(1e15 * disk_seconds(spill_folder(resources)))
    except CAPError:
        seconds = -1
    # Processes gather whole numbers.
    found = [each for (each,) in processes.gather_ints(seconds)]
    return None if min(found) < 0 else max(found) / 1e15


def extra_seconds(
    plan: Plan,
    costs: Costs,
    processes: Processes,
    seconds_per_byte: float,
    prior: bool,
    prunes: int,
    config: CAPConfig,
) -> float:
    """Return the seconds that a plan takes beside the solving, to the largest of what the processes say.

    Args:
        plan: of several passes.
        costs: of a gradient sample.
        processes: of the run.
        seconds_per_byte: that writing to the disk takes, and as many that reading does.
        prior: whether inputs are summed too.
        prunes: how many sparsities will be pruned to.
        config: how to prune, for the gradient samples of a pass.
    """
    ways = [(number, number == 0) for number in range(len(plan.passes))] + passes_again(plan)
    seconds = sum(pass_seconds(plan, number, costs, prior, keeping=keeping) for number, keeping in ways)
    seconds *= config.num_grads / processes.world
    # Written once, read by the elimination and for the weights of each sparsity.
    seconds += (2 + prunes * plan.rounds) * plan.spilled * seconds_per_byte
    return max(each for (each,) in processes.gather_ints(int(1e3 * seconds))) / 1e3


def strides(costs: Costs) -> list[int]:
    """Return of every how many layers hidden states may be kept: of fewer of them, passes go through more layers."""
    longest = max((len(chain.layers) for chain in costs.chains), default=0)
    return [stride for stride in STRIDES if stride < max(longest, 2)] if longest else []


def automatic_sizes(find: Find) -> list[int | str]:
    """Return the block sizes that are tried in turn where none is asked for."""

    def is_cheap(size: int | str) -> bool:
        return sum(solver.work_of(target, target.num_blocks) for target in find(size)) <= MOST_WORK

    return [size for size in BLOCK_SIZES if (size != "row" and int(size) <= USUAL_SIZE) or is_cheap(size)]
