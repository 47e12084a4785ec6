"""The block Fisher, summed from gradient samples."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise, zip_longest

import torch
from torch import nn
from torch.nn import functional as F

from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.memory import zeros
from cap_hf.method.gradients import GradientSamples, StepGradients, labels_for
from cap_hf.targets import Target, summarize

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]

# Rows of a weight whose gradients are made at a time: so few that the gradients of 64 examples stay in the cache until
# they are summed, but enough for a matrix product, and so many pieces that processes have even shares of them.
PIECE_BYTES, PIECE_ROWS, PIECES = 8 * 2**20, 24, 16
# A symmetric sum is cut into strips of at least this height, and at most so many of them.
STRIP_ROWS, MAX_STRIPS = 16, 6


class SymmetricSums:
    """Sums of outer products, of which a little more than the lower half is stored and computed.

    Strip i holds rows `edges[i]` to `edges[i + 1]` and the columns before `edges[i + 1]`.

    Args:
        size: B, their rows and columns.
        strips: of height `edges[i + 1] - edges[i]`, each `(count, height, edges[i + 1])`.
    """

    def __init__(self, size: int, strips: list[torch.Tensor]) -> None:
        self.size, self.strips, self.edges = size, strips, strip_edges(size)

    @classmethod
    def zeros(cls, count: int, size: int, dtype: torch.dtype, device: torch.device) -> "SymmetricSums":
        """`count` matrices of zeros."""
        edges = strip_edges(size)
        shapes = [(count, stop - start, stop) for start, stop in pairwise(edges)]
        return cls(size, [zeros(shape, dtype, device) for shape in shapes])

    def __len__(self) -> int:
        return len(self.strips[0])

    def add(self, blocks: slice, factors: torch.Tensor) -> None:
        """Add `factors[b].T @ factors[b]` to some of the matrices, for factors `(n, samples, B)`."""
        for strip, start, stop in zip(self.strips, self.edges, self.edges[1:], strict=False):
            strip[blocks].baddbmm_(factors[:, :, start:stop].mT, factors[:, :, :stop])

    def full(self, index: slice | torch.Tensor = slice(None), dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Some of the matrices, whole, `(n, B, B)`, a new tensor."""
        rows = [strip[index] for strip in self.strips]
        full = torch.empty(len(rows[0]), self.size, self.size, dtype=dtype, device=rows[0].device)
        for strip, start, stop in zip(rows, self.edges, self.edges[1:], strict=False):
            full[:, start:stop, :stop] = strip
            full[:, :start, start:stop] = strip[:, :, :start].mT
        return full

    def diagonals(self) -> torch.Tensor:
        """`(count, B)`."""
        parts = [
            strip.diagonal(offset=start, dim1=1, dim2=2) for strip, start in zip(self.strips, self.edges, strict=False)
        ]
        return torch.cat(parts, dim=1)

    def zero_(self) -> None:
        for strip in self.strips:
            strip.zero_()


def strip_edges(size: int) -> list[int]:
    """Where the strips of a symmetric B x B matrix begin, and B."""
    strips = max(1, min(MAX_STRIPS, size // STRIP_ROWS))
    return [size * index // strips for index in range(strips + 1)]


def sums_per_block(size: int) -> int:
    """How many entries are stored of a symmetric B x B matrix."""
    edges = strip_edges(size)
    return sum((stop - start) * stop for start, stop in pairwise(edges))


def row_pieces(target: Target) -> list[slice]:
    """A target's rows in pieces that are whole blocks and depend on nothing else.

    Matrix products round differently for different shapes: pieces that are the same for any number of processes give
    the same sums, bit for bit.
    """
    rows = len(target.weight)
    fitting = max(PIECE_ROWS, PIECE_BYTES // (64 * 4 * target.row_size))
    height = min(max(min(PIECE_ROWS, -(-rows // 4)), -(-rows // PIECES)), fitting)
    unit = max(1, target.block_size // target.row_size)
    height = -(-height // unit) * unit
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


def block_shares(target: Target, processes: Processes) -> list[slice]:
    """The blocks of a target that each process owns: those of consecutive pieces."""
    pieces = row_pieces(target)
    edges = [0, *(piece.stop * target.row_size // target.block_size for piece in pieces)]
    return [slice(edges[share.start], edges[share.stop]) for share in processes.shares(len(pieces))]


class BlockFisher:
    """`F_b = (1/N) sum g_b g_b^T` for every block of every target (arXiv 2210.09223, eq. of the empirical Fisher).

    Of several processes each owns an equal share of every target's blocks: it is sent all processes' gradients of
    these and sums them in the order of the examples, so that the sums do not depend on the number of processes.

    Attributes:
        owned: for each target's name the blocks whose sums this process has.
        sums: for each target's name the sums of outer products of those.
        count: how many gradient samples they hold.

    Args:
        targets: whose Fisher it is.
        processes: of the run; None for this process alone.
        dtype: what gradients are rounded to before they are multiplied: float32, or bfloat16 (then CUDA also
            multiplies in tf32). Sums are float32 (float64 in a float64 model).
        at_a_time: gradient samples that go through the model at a time, where that is fewer than a step has.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        processes: Processes | None = None,
        dtype: torch.dtype = torch.float32,
        at_a_time: int | None = None,
    ) -> None:
        self.targets = list(targets)
        self.processes = processes or Processes()
        self.dtype, self.at_a_time = dtype, at_a_time
        self.count = 0
        self.owned = {target.name: block_shares(target, self.processes)[self.processes.rank] for target in self.targets}
        self.sums = {target.name: self._zeros(target) for target in self.targets}
        self._buffers: dict[str, torch.Tensor] = {}
        # Of a step in which some process has no examples: who tells it which target is next.
        self._leader: int | None = None

    def _zeros(self, target: Target) -> SymmetricSums:
        dtype = torch.promote_types(target.weight.dtype, torch.float32)
        owned = self.owned[target.name]
        return SymmetricSums.zeros(owned.stop - owned.start, target.block_size, dtype, target.weight.device)

    def add(self, target: Target, gradients: StepGradients | None, counts: Sequence[int] | None = None) -> None:
        """Add the outer products of a step's gradient samples.

        Args:
            target: one of `targets`.
            gradients: of this process's examples; None if it has none.
            counts: how many gradient samples each process has in this step; None where there is one process.
        """
        counts = counts or [gradients.samples]
        size, sums = target.block_size, self.sums[target.name]
        dtype = sums.strips[0].dtype
        turns, done = self._turns(target), 0
        for turn, parts in zip(turns, self._arrivals(target, gradients, turns, counts), strict=True):
            rows = turn[self.processes.rank]
            blocks = (rows.stop - rows.start) * target.row_size // size
            for part, count in zip(parts, counts, strict=True):
                if blocks and count:
                    with self._precision():
                        sums.add(slice(done, done + blocks), part.view(blocks, count, size).to(dtype))
            done += blocks

    def _arrivals(
        self, target: Target, gradients: StepGradients | None, turns: list[list[slice]], counts: Sequence[int]
    ) -> Iterator[list[torch.Tensor]]:
        """Of each turn the gradients of this process's rows, by process; the next turn's are on their way meanwhile."""
        waiting = None
        for index, turn in enumerate(turns):
            begun = self._send(target, gradients, turn, counts, slot=index % min(self.processes.world, 2))
            if self.processes.world == 1:
                yield begun()
                continue
            if waiting is not None:
                yield waiting()
            waiting = begun
        if waiting is not None:
            yield waiting()

    def _turns(self, target: Target) -> list[list[slice]]:
        """A target's rows, turn by turn: for each process the next piece of those that it owns, or none."""
        pieces = row_pieces(target)
        shares = [pieces[share] for share in self.processes.shares(len(pieces))]
        return [list(turn) for turn in zip_longest(*shares, fillvalue=slice(0, 0))]

    def _send(
        self, target: Target, gradients: StepGradients | None, turn: list[slice], counts: Sequence[int], slot: int
    ) -> Callable[[], list[torch.Tensor]]:
        """Make the gradients of a turn's rows and send them to who owns these; returns what waits for one's own."""
        dtype, device = torch.promote_types(target.weight.dtype, torch.float32), target.weight.device
        dtype = self.dtype if dtype == torch.float32 else dtype
        weights = [(rows.stop - rows.start) * target.row_size for rows in turn]
        rank = self.processes.rank
        parts, sizes = [counts[rank] * each for each in weights], [count * weights[rank] for count in counts]
        sent = self._buffer(f"sent {slot}", (sum(parts),), dtype, device)
        for rows, part in zip(turn, sent.split(parts), strict=True):
            if part.numel():
                self._make(target, gradients, rows, part)
        received = self._buffer(f"received {slot}", (sum(sizes) if len(counts) > 1 else 0,), dtype, device)
        return self.processes.exchange(sent, parts, received, sizes)

    def _make(self, target: Target, gradients: StepGradients, rows: slice, out: torch.Tensor) -> None:
        """Write the gradients of some rows into `out`, 1-d, block by block: `(blocks, samples, B)`."""
        dtype = torch.promote_types(target.weight.dtype, torch.float32)
        shape = (gradients.samples, rows.stop - rows.start, target.row_size)
        made = self._buffer("rows", shape, dtype, target.weight.device)
        with self._precision():
            gradients.rows(rows.start, rows.stop, made)
        made = made.view(gradients.samples, -1, target.block_size).transpose(0, 1)
        out.view(made.shape).copy_(made)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # Touching fresh memory costs several times the product itself.
        buffer, numel = self._buffers.get(name), math.prod(shape)
        if buffer is None or buffer.numel() < numel or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(numel, dtype=dtype, device=device)
        return buffer[:numel].view(shape)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if self.dtype == torch.float32 or not torch.cuda.is_available():
            yield
            return
        before = torch.get_float32_matmul_precision()
        # tf32 holds a bfloat16 exactly.
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def collect(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Batch, int, torch.Tensor | None]],
        on_step: Callable[[int], None] = lambda samples: None,
    ) -> None:
        """Run the model over batches and add up.

        Args:
            model: in eval mode; its parameters need no `requires_grad`, and their `.grad` is not touched.
            batches: of this process: (batch with `labels`, number of gradient samples, uniforms for sampled labels
                or None). Processes may have different numbers of them.
            on_step: called after each batch (of all processes) with the number of its gradient samples.

        Raises:
            CAPError: a loss or a gradient is not finite (names the layer), or a layer mixes examples.
        """
        # Gradients of activations alone are needed: weights are frozen.
        required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        stream = iter(batches)
        try:
            with self._listen() as hooks:
                while True:
                    batch, samples, uniforms = next(stream, (None, 0, None))
                    counts = [count for (count,) in self.processes.gather_ints(samples)]
                    if not any(counts):
                        break
                    self._step(model, hooks, batch, uniforms, counts)
                    self.count += sum(counts)
                    on_step(sum(counts))
        finally:
            self._buffers.clear()
            for parameter, requires_grad in required.items():
                parameter.requires_grad_(requires_grad)
        self._finish(hooks)

    def _listen(self) -> AbstractContextManager:
        return GradientSamples(self.targets, lambda target, gradients: self._receive(target, gradients))

    def _step(
        self,
        model: nn.Module,
        hooks: GradientSamples,
        batch: Batch | None,
        uniforms: torch.Tensor | None,
        counts: list[int],
    ) -> None:
        """One forward and backward pass, or the part that a process without examples has in the others'."""
        self._counts = counts
        self._leader = None if all(counts) else next(rank for rank, count in enumerate(counts) if count)
        if batch is None:
            while (index := self.processes.broadcast_int(0, self._leader)) >= 0:
                self.add(self.targets[index], None, counts)
            return
        samples = counts[self.processes.rank]
        group = len(batch["labels"]) // samples
        is_finite = True
        for first in range(0, samples, self.at_a_time or samples):
            last = min(first + (self.at_a_time or samples), samples)
            hooks.start(last - first, last == samples)
            part = slice(first * group, last * group)
            inputs = {name: value[part] for name, value in batch.items() if name != "labels"}
            with torch.enable_grad():
                logits = model(**inputs).logits
                labels = labels_for(logits, batch["labels"][part], None if uniforms is None else uniforms[part])
                loss = F.cross_entropy(logits.float(), labels, reduction="sum") / group
            if loss.requires_grad:
                loss.backward()
            is_finite = is_finite and bool(loss.isfinite())
        if self._leader is not None:
            self.processes.broadcast_int(-1, self._leader)
        if not is_finite:
            self.check_finite()
            raise CAPError("the loss is NaN or infinite: check the model's head and the pixel values")

    def _receive(self, target: Target, gradients: StepGradients) -> None:
        if self._leader is not None:
            self.processes.broadcast_int(self.targets.index(target), self._leader)
        self.add(target, gradients, self._counts)

    def _finish(self, hooks: GradientSamples) -> None:
        self.check_finite()
        unseen = [target.name for target in self.targets if hooks.seen and target.name not in hooks.seen]
        if unseen:
            raise CAPError(
                f"{summarize(unseen, 3)} take no part in the model's forward pass: leave them out with --exclude"
            )

    def check_finite(self) -> None:
        """Raise a CAPError that names the first layers whose sums are not finite."""
        broken = [name for name, sums in self.sums.items() if not sums.diagonals().sum().isfinite()]
        if broken:
            raise CAPError(
                f"gradients are NaN or infinite in {summarize(broken, 3)}: check the model's weights and its dtype "
                "(load it in float32) and the pixel values"
            )

    def mean_diagonals(self) -> dict[str, float]:
        """The mean of each target's diagonal of F, over the blocks of all processes, exactly the same on each.

        Names blocks without any gradient in a warning.
        """
        means = {}
        for target in self.targets:
            traces = self._traces(target)
            means[target.name] = float(traces.sum()) / (len(traces) * target.block_size * self.count)
            dead = int((traces == 0).sum())
            if dead and self.processes.rank == 0:
                logger.warning(
                    "%s: %d of %d blocks have no gradient at all; their weights are removed first.",
                    target.name,
                    dead,
                    len(traces),
                )
        return means

    def _traces(self, target: Target) -> torch.Tensor:
        """The sum of the diagonal of every block, of all processes, `(num_blocks,)` in float64."""
        own = self.sums[target.name].diagonals().double().sum(dim=1)
        return self.processes.assemble(own, block_shares(target, self.processes))

    def damped(self, target: Target, blocks: slice | torch.Tensor, damp: float) -> torch.Tensor:
        """`F + damp I` of some of this process's blocks of a target, `(n, B, B)`, a new tensor in float64."""
        fisher = self.sums[target.name].full(blocks).div_(self.count)
        fisher.diagonal(dim1=-2, dim2=-1).add_(damp)
        return fisher


def damps(means: dict[str, float], damp: float, absolute: bool) -> dict[str, float]:
    """What is added to the diagonal of each target's F: `damp`, relative to the target's mean diagonal or not.

    A target without any gradient takes the mean damp of the others.

    Raises:
        CAPError: no target has a gradient.
    """
    alive = [mean for mean in means.values() if mean > 0]
    if not alive:
        raise CAPError("all gradients are 0: the loss does not depend on any target")
    fallback = sum(alive) / len(alive)
    return {name: damp if absolute else damp * (mean or fallback) for name, mean in means.items()}
