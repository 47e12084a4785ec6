"""How many processes read images beside the model."""

import os

import torch

from cap_hf.distributed.processes import processes_here

# More of them seldom read faster, and each takes memory.
MOST_WORKERS = 8


def num_workers(wish: int | None, device: torch.device, processes: int | None = None) -> int:
    """Return how many worker processes a DataLoader gets.

    On a CPU they take from the model the cores that they read on, and gain nothing (docs/scaling.md).

    Args:
        wish: what was asked for; None for as many as the cores of a process beside CUDA allow, and none on a CPU.
        device: that the model is on.
        processes: that share the machine; None for those of this run.
    """
    if wish is not None:
        return wish
    if device.type != "cuda":
        return 0
    return max(0, min(MOST_WORKERS, usable_cores() // (processes or processes_here()) - 1))


def usable_cores() -> int:
    """Return the number of cores that this process may run on, where the system says it, else of all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
