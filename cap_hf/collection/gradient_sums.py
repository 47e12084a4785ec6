"""Sums of the outer products of gradient samples, of the blocks that this process owns."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from cap_hf.collection.exchange import Exchange, made_in
from cap_hf.collection.input_sums import InputSums
from cap_hf.collection.kept_states import KeptStep, Through, WholeModel
from cap_hf.collection.parts import within
from cap_hf.collection.precision import matmul_precision
from cap_hf.collection.running import Batch
from cap_hf.collection.shares import block_shares, own_blocks
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.memory import zeros
from cap_hf.method.gradients import GradientSamples, StepGradients
from cap_hf.method.losses import LabelLoss
from cap_hf.method.sums import Make, SymmetricSums, check_finite
from cap_hf.targets import Target, summarize


class GradientSums:
    """`sum g_b g_b^T` for every block of some targets, filled step by step.

    Of several processes each owns a share of every target's blocks: it is sent all processes' gradients of these and
    sums them in the order of the examples, so that the sums do not depend on the number of processes.

    Args:
        targets: whose sums they are; of a part of one, those of its blocks.
        processes: of the run; None for this process alone.
        dtype: what gradients are rounded to before they are multiplied and sent: float32, or bfloat16 (then CUDA also
            multiplies in tf32). Sums are float32 (float64 in a float64 model).
        microbatch: gradient samples that go through the model together; None for all of a step.
        order: names of the targets in the order in which a backward pass meets them; needed by several processes.
        through: takes examples through the model; None for all of it, to the cross entropy with labels.
        inputs: of the same targets, filled with the inputs of the same examples; None where they are not asked for.
        make: takes the memory of the sums.
        traced: names of the targets whose `traces` are wanted, of all blocks; None for all.

    Attributes:
        sums: for each target's name those of the blocks that this process owns.
        traced: those targets, whole.
        count: how many gradient samples they hold.
    """

    shared = False

    def __init__(
        self,
        targets: Sequence[Target],
        processes: Processes | None = None,
        dtype: torch.dtype = torch.float32,
        microbatch: int | None = None,
        order: Sequence[str] = (),
        through: Through | None = None,
        inputs: InputSums | None = None,
        make: Make = zeros,
        traced: Collection[str] | None = None,
    ) -> None:
        self.targets, self.processes = list(targets), processes or Processes()
        self.dtype, self.microbatch = dtype, microbatch
        self.through: Through = through or WholeModel(LabelLoss())
        self.inputs = inputs
        self.count = 0
        self.sums = {target.name: self._zeros(target, make) for target in self.targets}
        self.traced = [target.whole for target in self.targets if traced is None or target.name in traced]
        # Of a part of a target no more is summed, and yet its damp is to be the same as that of the whole.
        self._traces = {target.name: self._no_traces(target) for target in self.traced}
        by_name = {target.name: target for target in self.targets}
        self._order = [by_name[name] for name in order if name in by_name]
        self._exchange = Exchange(self.processes, dtype)
        # Of the step that is taken: what has come too early for the order, and how far that is done.
        self._counts: Sequence[int] = ()
        self._waiting: dict[str, StepGradients] = {}
        self._next = 0

    def _zeros(self, target: Target, make: Make) -> SymmetricSums:
        own, device = own_blocks(target, self.processes), target.weight.device
        return SymmetricSums.zeros(own.stop - own.start, target.block_size, made_in(target), device, make)

    def _no_traces(self, target: Target) -> torch.Tensor:
        own = own_blocks(target, self.processes)
        return torch.zeros(own.stop - own.start, dtype=torch.float64, device=target.weight.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have hooks on the targets; inside the context steps can be taken."""
        try:
            with ExitStack() as stack:
                self._hooks = stack.enter_context(GradientSamples(self.targets, self._receive))
                if self.inputs is not None:
                    stack.enter_context(self.inputs.listening())
                yield
        finally:
            self._exchange = Exchange(self.processes, self.dtype)  # without buffers

    def step(
        self, model: nn.Module, batch: Batch | KeptStep | None, draws: torch.Tensor | None, counts: Sequence[int]
    ) -> None:
        """Add a step's gradient samples.

        Args:
            model: frozen.
            batch: this process's examples, as `through` takes them; None if it has none.
            draws: as for `Through`.
            counts: how many gradient samples each process has.

        Raises:
            CAPError: the loss or a gradient is not finite, or a target is missing in this step.
        """
        self._counts, self._waiting, self._next = counts, {}, 0
        if batch is None:
            for target in self._order:
                self.add(target, None, counts)
            return
        samples = counts[self.processes.rank]
        microbatch = self.microbatch or samples
        is_finite = True
        for first in range(0, samples, microbatch):
            last = min(first + microbatch, samples)
            self._hooks.start(last - first, last == samples)
            loss = self.through(model, batch, draws, samples, slice(first, last))
            is_finite = is_finite and bool(loss.isfinite())
        if self._waiting or (self.processes.world > 1 and self._next < len(self._order)):
            missing = [target.name for target in self._order[self._next :] if target.name not in self._waiting]
            names = summarize(missing or list(self._waiting), 3)
            raise CAPError(f"{names} take part in some batches and not in others: leave them out with --exclude")
        if not is_finite:
            self._check_finite()
            raise CAPError("the loss is NaN or infinite: check the model's head and the pixel values")

    def _receive(self, target: Target, gradients: StepGradients) -> None:
        """Add a target's gradients, with several processes in the order that all of them keep to."""
        if self.processes.world == 1:
            self.add(target, gradients, self._counts)
            return
        self._waiting[target.name] = gradients
        while self._next < len(self._order) and self._order[self._next].name in self._waiting:
            target = self._order[self._next]
            self.add(target, self._waiting.pop(target.name), self._counts)
            self._next += 1

    def add(self, target: Target, gradients: StepGradients | None, counts: Sequence[int] | None = None) -> None:
        """Add the outer products of one target's gradient samples.

        Args:
            target: one of `targets`.
            gradients: of this process's examples; None if it has none.
            counts: how many gradient samples each process has; None where there is one process.
        """
        counts = counts or [0 if gradients is None else gradients.samples]
        sums, traces = self.sums[target.name], self._traces.get(target.name)
        # Gradients of blocks that are not summed are made for their traces alone.
        arriving, summed = (
            (target, slice(0, len(sums))) if traces is None else (target.whole, within(target, self.processes))
        )
        with matmul_precision(self.dtype):
            for blocks, parts in self._exchange.arrivals(arriving, gradients, counts):
                for part in parts:
                    if not part.numel():
                        continue
                    factors = part.to(sums.dtype)
                    if traces is not None:
                        norms = torch.linalg.vector_norm(factors, dim=(1, 2))
                        traces[blocks].addcmul_(norms, norms)  # in the dtype of the traces
                    if summed.start <= blocks.start < summed.stop:
                        sums.add(slice(blocks.start - summed.start, blocks.stop - summed.start), factors)

    def finish(self) -> None:
        """Check what was summed, and add up the inputs of all processes.

        Raises:
            CAPError: a gradient or an input was not finite, or a target was never met.
        """
        self._check_finite()
        unseen = [target.name for target in self.targets if self._hooks.seen and target.name not in self._hooks.seen]
        if unseen:
            raise CAPError(
                f"{summarize(unseen, 3)} take no part in the model's forward pass: leave them out with --exclude"
            )
        if self.inputs is not None:
            self.inputs.finish()

    def _check_finite(self) -> None:
        # Traces are of all blocks, also where a part of a target is summed.
        check_finite({name: each.diagonals() for name, each in self.sums.items()} | self._traces)

    def strips(self, target: Target) -> list[torch.Tensor]:
        """Return what has been summed of a target, in this process: what a run that goes on needs."""
        inputs = [] if self.inputs is None else self.inputs.strips(target)
        traces = [self._traces[target.name]] if target.name in self._traces else []
        return self.sums[target.name].strips + inputs + traces

    @property
    def moments(self) -> dict[str, SymmetricSums]:
        """Return for each target's name the sums of its inputs, of all processes, after `finish`; none without."""
        return {} if self.inputs is None else self.inputs.sums

    def clear(self) -> None:
        """Let go of all sums."""
        self.sums, self.inputs = {}, None

    def traces(self, target: Target) -> torch.Tensor:
        """Return the trace of every block of a `traced` target, of all processes, `(num_blocks,)` in float64."""
        return self.processes.assemble(self._traces[target.name], block_shares(target.whole, self.processes))
