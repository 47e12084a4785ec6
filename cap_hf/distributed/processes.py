"""What several processes own and tell each other; with one process everything here is a plain copy.

A *share* is the blocks of a target that one process owns: it sums their gradients, and eliminates and solves them.
"""

import json
import os
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from cap_hf.errors import CAPError


class Processes:
    """The processes of a run, each of which owns a share of every target's blocks.

    All methods but `shares` are collective: every process calls them, in the same order. Tensors may lie on any
    device, with any strides. What a backend raises when another process has ended is passed on as it is; see
    `cap_hf.distributed.watch.lost_peer`.

    Attributes:
        rank: this process's number.
        world: how many there are.
        device: what this process computes on, and where tensors lie while they are sent.

    Raises:
        CAPError: the launcher has started several processes, and accelerate has not connected them.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes
        # Launchers tell every process its LOCAL_RANK; clusters may set WORLD_SIZE alone.
        launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if accelerator is not None and launched > self.world == 1:
            raise CAPError(
                f"{launched} processes were launched, but accelerate has not connected them: without GPUs set "
                "ACCELERATE_USE_CPU=true"
            )
        self.device = torch.device("cpu") if accelerator is None else accelerator.device

    def shares(self, count: int, turn: int = 0) -> list[slice]:
        """Share out equal pieces of work: one slice per process, consecutive in the order of the processes.

        Args:
            count: how many pieces there are.
            turn: which processes get one more than the others where the pieces do not come out even. Over `world`
                turns with the same count each process gets the same number of pieces.

        Returns:
            Slices whose sizes differ by one at most.
        """
        edges = [count * rank // self.world for rank in range(self.world + 1)]
        sizes = [stop - start for start, stop in pairwise(edges)]
        turn %= self.world
        edges = [0, *accumulate(sizes[turn:] + sizes[:turn])]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def gather_ints(self, *values: int) -> list[list[int]]:
        """Return the whole numbers of every process, `[rank][index]`."""
        return [each.tolist() for each in self._gather(torch.tensor(values, dtype=torch.int64))]

    def before(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum over the processes before this one: zeros on the first.

        Args:
            tensor: of the same shape on every process; small, since each process is sent all of them.

        Returns:
            A new tensor like it.
        """
        return sum(self._gather(tensor)[: self.rank], start=torch.zeros_like(tensor))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place; returns the tensor."""
        if self.world > 1:
            sent = self._sendable(tensor)
            dist.all_reduce(sent)
            _write_back(sent, tensor)
        return tensor

    def share_object(self, value: object, source: int = 0) -> Any:
        """Return a small object of the process `source`, on every process, as JSON has it (tuples become lists).

        Args:
            value: of JSON's types; the other processes may pass anything of these.
            source: the rank of the process whose object it is.
        """
        text = json.dumps(value)
        if self.world == 1:
            return json.loads(text)
        # The text of another process may have another length.
        encoded = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8)
        length = int(self._broadcast(torch.tensor([len(encoded)]), source))
        sent = encoded if self.rank == source else torch.empty(length, dtype=torch.uint8)
        return json.loads(bytes(self._broadcast(sent, source).tolist()))

    def share_first(self, value: Any) -> Any:
        """Return a small object of the first process on which it is not empty, on every process, as `share_object`."""
        there = [bool(each) for (each,) in self.gather_ints(bool(value))]
        return self.share_object(value, there.index(True) if any(there) else 0)

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Return what a function returns on the first process, on every process, as `share_object`.

        Raises:
            CAPError: the function raised it, on the first process; it is raised on every process.
        """
        found, wrong = None, ""
        if self.rank == 0:
            try:
                found = work()
            except CAPError as error:
                wrong = str(error)
        if wrong := self.share_object(wrong):
            raise CAPError(wrong)
        return self.share_object(found)

    def meet(self) -> Callable[[], None]:
        """Tell all processes that this one has come so far; return what waits until all have."""
        if self.world == 1:
            return lambda: None
        sent, received = (torch.zeros(self.world, dtype=torch.uint8, device=self.device) for _ in range(2))
        work = dist.all_to_all_single(received, sent, async_op=True)

        def wait() -> None:
            work.wait()

        return wait

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
        width, arriving = sent.element_size(), self._sendable(received)
        work = dist.all_to_all_single(
            _as_bytes(arriving),
            _as_bytes(self._sendable(sent)),
            [width * size for size in sizes],
            [width * size for size in parts],
            async_op=True,
        )

        def arrived() -> list[torch.Tensor]:
            work.wait()
            _write_back(arriving, received)
            return list(received.split(list(sizes)))

        return arrived

    def assemble(self, part: torch.Tensor, shares: Sequence[slice]) -> torch.Tensor:
        """Return every process's rows of a tensor, in order, on every process.

        Args:
            part: this process's rows, `(rows of its share, ...)`.
            shares: the rows of each process.
        """
        if self.world == 1:
            return part
        whole = torch.empty(shares[-1].stop, *part.shape[1:], dtype=part.dtype, device=self.device)
        whole[shares[self.rank]] = part
        for rank, share in enumerate(shares):
            if share.stop > share.start:
                dist.broadcast(_as_bytes(whole[share]), rank)
        return whole.to(part.device)

    def _sendable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as every backend takes it: contiguous, on the device; the tensor itself where it is that.

        gloo, the backend of CPUs, takes tensors of the CPU; NCCL and its like take only those of their own device. A
        model may lie on the CPU beside an accelerator all the same: pruning by magnitude leaves it there.
        """
        return tensor.to(self.device).contiguous()

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.world == 1:
            return [tensor]
        own = self._sendable(tensor)
        everyone = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(everyone, own)
        return [each.to(tensor.device) for each in everyone]

    def _broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        sent = self._sendable(tensor)
        dist.broadcast(sent, source)
        return sent


def _write_back(sent: torch.Tensor, tensor: torch.Tensor) -> None:
    """Write what was received in place of a tensor to it, unless it was received there."""
    if sent is not tensor:
        tensor.copy_(sent)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor as bytes: not every backend knows every dtype."""
    return tensor.view(torch.uint8)


def processes_here() -> int:
    """Return how many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
