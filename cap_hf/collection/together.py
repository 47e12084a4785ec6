"""How many sparsities are solved for together: their Fishers are read once, and the new weights of all are kept."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from cap_hf.collection.plan import Plan
from cap_hf.collection.shares import largest_shares
from cap_hf.distributed.processes import Processes, processes_here
from cap_hf.targets import Target

# Of what a plan leaves free, what new weights may take that wait for their turn: a refit looks at what is free, too.
SHARE = 0.25


def together(
    plan: Plan, targets: Sequence[Target], processes: Processes, prunes: int, folder: Path | None = None
) -> int:
    """Return how many of so many sparsities are solved for together, the same on every process.

    Args:
        plan: of the collection.
        targets: that are pruned.
        processes: of the run.
        prunes: sparsities that there are.
        folder: where new weights go to the disk; None where they stay in memory.
    """
    if plan.recollects:
        # Memory for the new weights of so many is in the plan.
        return prunes
    blocks = largest_shares(list(targets), processes)
    each = sum(
        count * target.block_size * target.weight.element_size() for target, count in zip(targets, blocks, strict=True)
    )
    free = max(0, plan.available - plan.needed)
    if folder is not None:
        free = shutil.disk_usage(folder).free // processes_here()
        free = min(int(values[0]) for values in processes.gather_ints(free))
    # The first one has its place in the plan.
    return max(1, min(prunes, 1 + int(SHARE * free) // max(each, 1)))
