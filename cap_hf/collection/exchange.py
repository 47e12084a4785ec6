"""Makes each target's gradients, chunk by chunk of its rows, and brings them to the process that owns their blocks."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch

from cap_hf.collection.shares import chunk_shares, chunk_weights
from cap_hf.distributed.processes import Processes
from cap_hf.distributed.shared_memory import SLOTS, SharedMemory, open_shared_memory
from cap_hf.method.gradients import StepGradients
from cap_hf.targets import Target

# Of what a process sends another one in a round: to announce less takes as long as to send it.
ROUND_BYTES = 4 * 2**20


class Exchange:
    """Hands each process the gradients of the blocks that it owns, of all processes' examples.

    In a round each process is sent a few chunks of its rows; the next round's gradients are on their way while those of
    the one before are summed. With one process nothing is sent, and on one machine's CPUs what is sent is read where it
    was made.

    Args:
        processes: of the run.
        dtype: what gradients are rounded to, float32 or bfloat16; a float64 model's stay float64.
    """

    def __init__(self, processes: Processes, dtype: torch.dtype) -> None:
        self.processes, self.dtype = processes, dtype
        self._buffers: dict[str, torch.Tensor] = {}
        self._shared: SharedMemory | None = None
        self._begun = False

    def arrivals(
        self, target: Target, gradients: StepGradients | None, counts: Sequence[int]
    ) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Yield round by round some blocks of this process and their gradients.

        Args:
            target: whose gradients they are.
            gradients: of this process's examples; None if it has none in this step.
            counts: how many gradient samples each process has.

        Yields:
            The blocks, counted from the first one owned, and for each process `(blocks, samples, B)`, which is good
            until the next round.
        """
        rank, size, done = self.processes.rank, target.block_size, 0
        if gradients is None and counts[rank]:
            raise ValueError(f"{counts[rank]} gradient samples of {target.name} are announced and not given")
        for chunks, arrived in self._rounds(target, gradients, counts):
            weights = [(each.stop - each.start) * target.row_size for each in chunks]
            parts = [
                part.split([count * each for each in weights]) for part, count in zip(arrived, counts, strict=True)
            ]
            for number, each in enumerate(weights):
                blocks = each // size
                yield (
                    slice(done, done + blocks),
                    [part[number].view(blocks, count, size) for part, count in zip(parts, counts, strict=True)],
                )
                done += blocks

    def _rounds(
        self, target: Target, gradients: StepGradients | None, counts: Sequence[int]
    ) -> Iterator[tuple[Sequence[slice], list[torch.Tensor]]]:
        """Yield the chunks of this process in a round, and what has arrived of them from each."""
        if not self._begun:
            self._shared, self._begun = open_shared_memory(self.processes), True
        rank, most = self.processes.rank, max(counts) * chunk_weights(target, self.processes.device)
        owned, ahead, at_once = chunk_shares(target, self.processes), 0, 1
        if self.processes.world > 1:
            bytes_ = max(1, most * self._sent_in(target).itemsize)
            ahead, at_once = 1, max(1, min(ROUND_BYTES // bytes_, *map(len, owned)))
            if self._shared is not None and not self._shared.fits(at_once * bytes_):
                self._shared = None
        shares = [[share[start : start + at_once] for start in range(0, len(share), at_once)] for share in owned]
        waiting: deque[tuple[Sequence[slice], Callable[[], list[torch.Tensor]]]] = deque()
        for index, chunks in enumerate(zip_longest(*shares, fillvalue=())):
            slot = index % (ahead + 1)
            waiting.append((chunks[rank], self._send(target, gradients, chunks, counts, slot)))
            if len(waiting) > ahead:
                own, arrived = waiting.popleft()
                yield own, arrived()
        for own, arrived in waiting:
            yield own, arrived()

    def _send(
        self,
        target: Target,
        gradients: StepGradients | None,
        chunks: Sequence[Sequence[slice]],
        counts: Sequence[int],
        slot: int,
    ) -> Callable[[], list[torch.Tensor]]:
        """Make the gradients of a round's chunks and send them to who owns these; return what waits for one's own."""
        device, dtype = target.weight.device, self._sent_in(target)
        weights = [[(each.stop - each.start) * target.row_size for each in rows] for rows in chunks]
        rank = self.processes.rank
        parts = [counts[rank] * sum(each) for each in weights]
        sizes = [count * sum(weights[rank]) for count in counts]
        if self._shared is None:
            sent = self._buffer(f"sent {slot}", (sum(parts),), dtype, device)
            rooms: Sequence[torch.Tensor] = sent.split(parts)
        else:
            rooms = self._shared.room(parts, dtype)
        for rows, each, room in zip(chunks, weights, rooms, strict=True):
            for chunk, part in zip(rows, room.split([counts[rank] * one for one in each]), strict=True):
                if gradients is not None and part.numel():
                    self._make(target, gradients, chunk, part)
        if self._shared is not None:
            return self._shared.send(sizes, dtype)
        received = self._buffer(f"received {slot}", (sum(sizes) if len(counts) > 1 else 0,), dtype, device)
        return self.processes.exchange(sent, parts, received, sizes)

    def _sent_in(self, target: Target) -> torch.dtype:
        kept = made_in(target)
        return self.dtype if kept == torch.float32 else kept

    def _make(self, target: Target, gradients: StepGradients, rows: slice, out: torch.Tensor) -> None:
        """Write the gradients of some rows into `out`, 1-d, block by block: `(blocks, samples, B)`."""
        shape = (gradients.samples, rows.stop - rows.start, target.row_size)
        made = self._buffer("made", shape, made_in(target), target.weight.device)
        gradients.rows(rows.start, rows.stop, made)
        made = made.view(gradients.samples, -1, target.block_size).transpose(0, 1)
        out.view(made.shape).copy_(made)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # Touching fresh memory costs several times the product itself.
        buffer, numel = self._buffers.get(name), math.prod(shape)
        if buffer is None or buffer.numel() < numel or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(numel, dtype=dtype, device=device)
        return buffer[:numel].view(shape)


def made_in(target: Target) -> torch.dtype:
    """Return the dtype that a target's gradients are made and summed in: float32, or a float64 model's own."""
    return torch.promote_types(target.weight.dtype, torch.float32)


def peak_bytes(target: Target, processes: Processes, samples: int, dtype: torch.dtype) -> int:
    """Return the most bytes of an exchange's buffers for one target.

    Args:
        target: whose gradients are exchanged.
        processes: of the run.
        samples: gradient samples of a step, on each process.
        dtype: what gradients are rounded to.
    """
    entries, made = chunk_weights(target, processes.device) * samples, made_in(target)
    sent = dtype.itemsize if made == torch.float32 else made.itemsize
    # Where they were rounded they are made wider again to be summed.
    widened = entries * made.itemsize if sent < made.itemsize else 0
    if processes.world == 1:
        return entries * (made.itemsize + sent) + widened
    # Two rounds of what is sent and of what has come. On CPUs the memory that they may share takes more: that of all
    # rounds of a process, and what the others have for it.
    parts = 2 * 2 * processes.world
    if processes.device.type == "cpu":
        parts = SLOTS * (2 * processes.world - 1)
    chunks = max(1, min(ROUND_BYTES // max(1, entries * sent), *map(len, chunk_shares(target, processes))))
    return entries * made.itemsize + parts * chunks * entries * sent + widened
