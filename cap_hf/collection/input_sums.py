"""Sums of the outer products of layers' inputs, for SparseGPT and Wanda."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from cap_hf.collection.exchange import made_in
from cap_hf.collection.gradient_sums import check_finite
from cap_hf.collection.running import Batch
from cap_hf.distributed.processes import Processes
from cap_hf.method.inputs import input_rows
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target
from cap_hf.towers import see


class InputSums:
    """`sum x x^T` over the inputs x of every target, one matrix per target (one per group of a convolution).

    Every process sums its own examples; `finish` adds up what they have, so that all have the same.

    Args:
        targets: whose sums they are; a block is a row.
        processes: of the run; None for this process alone.

    Attributes:
        sums: for each target's name those of its groups.
        count: how many examples they hold.
    """

    shared = True

    def __init__(self, targets: Sequence[Target], processes: Processes | None = None) -> None:
        self.targets, self.processes = list(targets), processes or Processes()
        self.count = 0
        self.sums = {target.name: self._zeros(target) for target in self.targets}

    def _zeros(self, target: Target) -> SymmetricSums:
        groups = getattr(target.module, "groups", 1)
        return SymmetricSums.zeros(groups, target.block_size, made_in(target), target.weight.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have hooks on the targets; inside the context steps can be taken."""
        with ExitStack() as stack:
            for target in self.targets:
                for module in target.modules:
                    stack.callback(module.register_forward_hook(self._hook(target)).remove)
            yield

    def _hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            sums = self.sums[target.name]
            for rows in input_rows(target, module, args[0].to(sums.dtype), output):
                sums.add(slice(None), rows)

        return hook

    def step(self, model: nn.Module, batch: Batch | None, draws: torch.Tensor | None, counts: Sequence[int]) -> None:
        """Add a step's inputs; a process without examples has none."""
        if batch is not None:
            with torch.no_grad():
                see(model, batch)

    def finish(self) -> None:
        """Add up what all processes have.

        Raises:
            CAPError: an input was not finite.
        """
        for sums in self.sums.values():
            for strip in sums.strips:
                self.processes.sum(strip)
        check_finite(self.sums)

    def traces(self, target: Target) -> torch.Tensor:
        """Return the sum of the diagonal of every block, `(num_blocks,)` in float64."""
        traces = self.sums[target.name].diagonals().double().sum(dim=1)
        return traces.repeat_interleave(target.num_blocks // len(traces))
