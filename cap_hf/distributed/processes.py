"""What several processes tell each other; with one process everything here is a plain copy."""

import os
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from cap_hf.distributed.watch import lost_peer
from cap_hf.errors import CAPError

P = ParamSpec("P")
R = TypeVar("R")


def collective(method: Callable[P, R]) -> Callable[P, R]:
    """Turn what a backend raises when another process is gone into one line."""

    @wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (RuntimeError, dist.DistError) as error:
            if not lost_peer(error):
                raise
            raise CAPError("another process of this run has ended or cannot be reached: see what it said") from error

    return guarded


class Processes:
    """The processes of a run, each of which owns a share of every target's blocks.

    Attributes:
        rank: this process's number.
        world: how many there are.

    Raises:
        CAPError: the launcher has started several processes, and accelerate believes this one to be alone.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes
        # Launchers tell every process its LOCAL_RANK; clusters may set WORLD_SIZE alone.
        launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if accelerator is not None and launched > self.world == 1:
            raise CAPError(
                f"{launched} processes were launched and each believes to be alone: without GPUs set "
                "ACCELERATE_USE_CPU=true"
            )
        self.device = torch.device("cpu") if accelerator is None else accelerator.device

    def shares(self, count: int) -> list[slice]:
        """`count` equal pieces of work as one slice a process; their sizes differ by one at most."""
        edges = [count * rank // self.world for rank in range(self.world + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    @collective
    def gather_ints(self, *values: int) -> list[list[int]]:
        """Whole numbers of every process, `[rank][index]`."""
        if self.world == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(everyone, own)
        return [each.tolist() for each in everyone]

    @collective
    def broadcast_int(self, value: int, source: int) -> int:
        """A whole number of the process `source`, on every process."""
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, source)
        return int(tensor)

    @collective
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @collective
    def exchange(
        self, sent: torch.Tensor, parts: Sequence[int], received: torch.Tensor, sizes: Sequence[int]
    ) -> Callable[[], list[torch.Tensor]]:
        """Begin to send each process its part of a tensor.

        Args:
            sent: 1-d, the parts for the processes one after the other; not to be written to until all has arrived.
            parts: their numbers of entries.
            received: 1-d, gets what the processes send here.
            sizes: how many entries come from each.

        Returns:
            A function that waits for them and returns the parts of `received`.
        """
        if self.world == 1:
            return lambda: [sent]
        # As bytes: not every backend knows every dtype.
        width = sent.element_size()
        work = dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [width * size for size in sizes],
            [width * size for size in parts],
            async_op=True,
        )

        @collective
        def arrived() -> list[torch.Tensor]:
            work.wait()
            return list(received.split(list(sizes)))

        return arrived

    @collective
    def assemble(self, part: torch.Tensor, shares: Sequence[slice]) -> torch.Tensor:
        """Every process's rows of a tensor, in order, on every process; `part` are those of this one."""
        if self.world == 1:
            return part
        whole = part.new_empty(shares[-1].stop, *part.shape[1:])
        whole[shares[self.rank]] = part
        for rank, share in enumerate(shares):
            if share.stop > share.start:
                dist.broadcast(whole[share], rank)
        return whole
