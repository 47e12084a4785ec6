"""Sums of the outer products of layers' inputs: what SparseGPT and Wanda prune by, and the prior of a Fisher."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from cap_hf.collection.exchange import made_in
from cap_hf.collection.precision import matmul_precision
from cap_hf.collection.running import Batch
from cap_hf.distributed.processes import Processes
from cap_hf.method.inputs import input_rows, moment_size, num_moments
from cap_hf.method.sums import SymmetricSums, check_finite, sums_per_block
from cap_hf.targets import Target
from cap_hf.towers import see


class InputSums:
    """`sum x x^T` over what the blocks of every target are multiplied with, see `cap_hf.method.inputs`.

    Every process sums its own examples; `finish` adds up what they have, so that all have the same. Products are in
    float32 (float64 in a float64 model), what a process sums of them is in float64: such sums are exact but for inputs
    that differ by many orders of magnitude, and what all processes have together, rounded to float32 again, does not
    depend on how many they are.

    Args:
        targets: whose sums they are.
        processes: of the run; None for this process alone.

    Attributes:
        own: for each target's name the sums of this process's examples.
        sums: those of all processes', after `finish`.
        count: how many gradient samples they hold.
    """

    shared = True

    def __init__(self, targets: Sequence[Target], processes: Processes | None = None) -> None:
        self.targets, self.processes = list(targets), processes or Processes()
        self.count = 0
        self.own = {target.name: self._zeros(target) for target in self.targets}
        self.sums: dict[str, SymmetricSums] = {}

    def _zeros(self, target: Target) -> SymmetricSums:
        device = target.weight.device
        return SymmetricSums.zeros(num_moments(target), moment_size(target), torch.float64, device)

    @property
    def traced(self) -> list[Target]:
        """Return the targets whose `traces` there are."""
        return self.targets

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
            with torch.no_grad(), matmul_precision(torch.float32):
                for rows in input_rows(target, module, args[0].detach().to(made_in(target)), output):
                    self.own[target.name].add(slice(None), rows)

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
        for target in self.targets:
            strips = self.own[target.name].strips
            everyone = [self.processes.sum(strip.clone()).to(made_in(target)) for strip in strips]
            self.sums[target.name] = SymmetricSums(moment_size(target), everyone)
        check_finite({name: each.diagonals() for name, each in self.sums.items()}, "inputs")

    def strips(self, target: Target) -> list[torch.Tensor]:
        """Return what has been summed of a target, in this process: what a run that goes on needs."""
        return self.own[target.name].strips

    @property
    def moments(self) -> dict[str, SymmetricSums]:
        """Return none: these sums are a Fisher themselves, or they are what another one is mixed with."""
        return {}

    def clear(self) -> None:
        """Let go of all sums."""
        self.own, self.sums = {}, {}

    def traces(self, target: Target) -> torch.Tensor:
        """Return the sum of the diagonal of every block, `(num_blocks,)` in float64."""
        traces = self.sums[target.name].diagonals().double().sum(dim=1)
        return traces.repeat_interleave(target.num_blocks // len(traces))


def held_bytes(target: Target) -> int:
    """Return the most bytes that the sums of a target's inputs take, in each process: its own and those of all."""
    entries = num_moments(target) * sums_per_block(moment_size(target))
    return entries * (torch.float64.itemsize + made_in(target).itemsize)


def products(target: Target, rows: int) -> float:
    """Return the multiplications of so many rows' outer products, as `cap_hf.method.inputs.input_rows` has them."""
    return float(rows) * num_moments(target) * sums_per_block(moment_size(target))
