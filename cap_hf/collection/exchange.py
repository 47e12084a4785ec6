"""Makes each target's gradients, chunk by chunk of its rows, and brings them to the process that owns their blocks."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import torch

from cap_hf.collection.shares import chunk_shares, chunk_weights
from cap_hf.distributed.processes import Processes
from cap_hf.method.gradients import StepGradients
from cap_hf.targets import Target


class Exchange:
    """Hands each process the gradients of the blocks that it owns, of all processes' examples.

    In a round each process is sent one chunk of its rows; the next round's gradients are on their way while those of
    the one before are summed. With one process nothing is sent.

    Args:
        processes: of the run.
        dtype: what gradients are rounded to, float32 or bfloat16; a float64 model's stay float64.
    """

    def __init__(self, processes: Processes, dtype: torch.dtype) -> None:
        self.processes, self.dtype = processes, dtype
        self._buffers: dict[str, torch.Tensor] = {}

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
        for rows, parts in self._rounds(target, gradients, counts):
            blocks = (rows[rank].stop - rows[rank].start) * target.row_size // size
            yield (
                slice(done, done + blocks),
                [part.view(blocks, count, size) for part, count in zip(parts, counts, strict=True)],
            )
            done += blocks

    def _rounds(
        self, target: Target, gradients: StepGradients | None, counts: Sequence[int]
    ) -> Iterator[tuple[Sequence[slice], list[torch.Tensor]]]:
        """Yield the rows of each process in a round, and what has arrived here from each."""
        ahead = 0 if self.processes.world == 1 else 1
        waiting: deque[tuple[Sequence[slice], Callable[[], list[torch.Tensor]]]] = deque()
        for index, rows in enumerate(zip_longest(*chunk_shares(target, self.processes), fillvalue=slice(0, 0))):
            waiting.append((rows, self._send(target, gradients, rows, counts, slot=index % (ahead + 1))))
            if len(waiting) > ahead:
                rows, arrived = waiting.popleft()
                yield rows, arrived()
        for rows, arrived in waiting:
            yield rows, arrived()

    def _send(
        self,
        target: Target,
        gradients: StepGradients | None,
        rows: Sequence[slice],
        counts: Sequence[int],
        slot: int,
    ) -> Callable[[], list[torch.Tensor]]:
        """Make the gradients of a round's rows and send them to who owns these; return what waits for one's own."""
        device, kept = target.weight.device, made_in(target)
        dtype = self.dtype if kept == torch.float32 else kept
        weights = [(each.stop - each.start) * target.row_size for each in rows]
        rank = self.processes.rank
        parts, sizes = [counts[rank] * each for each in weights], [count * weights[rank] for count in counts]
        sent = self._buffer(f"sent {slot}", (sum(parts),), dtype, device)
        for each, part in zip(rows, sent.split(parts), strict=True):
            if gradients is not None and part.numel():
                self._make(target, gradients, each, part)
        received = self._buffer(f"received {slot}", (sum(sizes) if len(counts) > 1 else 0,), dtype, device)
        return self.processes.exchange(sent, parts, received, sizes)

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
    slots = 1 if processes.world == 1 else 2 * 2 * processes.world
    return entries * made.itemsize + slots * entries * sent + widened
