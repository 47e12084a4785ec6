"""What each block would give up, in which order and at what loss; how many it does; what becomes of the others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from cap_hf.collection.parts import MakeTensors, Tensors, join, key_of, within
from cap_hf.collection.precision import matmul_precision
from cap_hf.collection.recollection import Recollection
from cap_hf.collection.relevance import Relevance
from cap_hf.collection.running import Remembered
from cap_hf.collection.shares import block_shares, own_blocks
from cap_hf.collection.solver import Solver, order_dtype, work_of
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.masks import zero_units
from cap_hf.method.allocation import allocate_global, allocate_uniform, path_losses, removal_turns
from cap_hf.method.panels import Elimination
from cap_hf.patterns import NMPattern, Pattern, unit_of
from cap_hf.targets import Target, fit_block_size

# Told how many blocks are done, and how much work that was; made for a work that begins.
Advance = Callable[[int, float], None]
Begin = Callable[[float], Advance]


class RemovalPaths:
    """The weights at `collect` and, once they are eliminated, the removal paths of this process's blocks.

    Args:
        targets: that are pruned.
        solver: of their blocks.
        processes: of the run.
        tensors: where weights, orders and losses are kept.
        statistics: of batch norm, which are remembered as the biases of the targets' layers are.
        recollection: brings back the sums of a pass where not all are kept, see there.

    Attributes:
        beside: those statistics and biases, as they were at the beginning.
        relevance: of the model as it was then, which all refits share.
        weights: for each target's name those of this process's blocks, `(n, B)`, as they were at the beginning.
        orders, losses: for each target's name those of its removals, `(n, steps)`; complete only after `eliminate`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        solver: Solver,
        processes: Processes,
        tensors: MakeTensors = lambda name: {},
        statistics: Sequence[torch.Tensor] = (),
        recollection: Recollection | None = None,
    ) -> None:
        self.targets, self.solver, self.processes = list(targets), solver, processes
        self.recollection = recollection
        self.make_tensors = tensors
        self.weights = tensors("weights")
        for target in self.targets:
            own = own_blocks(target, processes)
            self.weights[target.name] = target.to_blocks(target.weight.detach())[own].clone()
        biases = [target.module.bias for target in self.targets if target.module.bias is not None]
        self.beside = Remembered([*biases, *statistics])
        self.relevance = Relevance()
        self.orders: Tensors = {}
        self.losses: Tensors = {}
        self._pattern: Pattern | None = None
        self._eliminated = False

    @property
    def num_weights(self) -> int:
        """Return how many weights all targets have."""
        return sum(target.weight.numel() for target in self.targets)

    @property
    def groups(self) -> Sequence[Sequence[Target]]:
        """Return the targets whose sums are there together; of one whose sums are too large, a part."""
        return [self.targets] if self.recollection is None else self.recollection.groups

    def work(self, targets: Sequence[Target]) -> float:
        """Return what the blocks of some targets take to solve, in the measure of `work_of`."""
        return sum(work_of(target, len(self._weights(target))) for target in targets)

    def count_zeros(self, unit: int = 1) -> list[int]:
        """Return how many units of each target, of all processes' weights, are 0 as a whole already."""
        own = [int(zero_units(self.weights[target.name], unit).sum()) for target in self.targets]
        return [sum(zeros) for zeros in zip(*self.processes.gather_ints(*own), strict=True)]

    def is_eliminated(self, pattern: Pattern | None) -> bool:
        """Return whether the paths of a pattern are there."""
        return self._eliminated and self._pattern == pattern

    def eliminate(self, pattern: Pattern | None, begin: Begin) -> None:
        """Find the order and losses of all removals; what an interrupted run has kept of them is taken as it is.

        Args:
            pattern: N:M, blocks, or None.
            begin: called with the work of the targets that are there together; returns what is told how many blocks
                are done, and how much work that was.

        Raises:
            CAPError: a block cannot be solved for, or N:M does not fit the blocks.
        """
        check_pattern(self.targets, pattern)
        kind = "" if pattern is None else f"-{pattern}".replace(":", "-")
        self.orders, self.losses = self.make_tensors(f"orders{kind}"), self.make_tensors(f"losses{kind}")
        self._eliminated, self._pattern = False, pattern
        waiting: list[list[Target]] = []
        for number, targets in enumerate(self.groups):
            # The losses are written last: where they are, the order is.
            rest = [target for target in targets if not self._has_losses(target)]
            self._load(number, len(rest))
            advance = begin(self.work(targets))
            for target in targets:
                if target not in rest:
                    advance(len(self._weights(target)), self.work([target]))
                elif self.solver.has_damp(target):
                    self._eliminate(target, advance)
            waiting.append([target for target in targets if not self._has_losses(target)])
            if self.recollection is not None:
                self.recollection.finish(number)
        # Targets without any gradient take the mean damp of all others, which is known only now.
        for number, targets in enumerate(waiting):
            self._load(number, len(targets), begun=True)
            if targets:
                advance = begin(self.work(targets))
                for target in targets:
                    self._eliminate(target, advance)
        join(self.groups, self.orders, self.losses)
        self._eliminated = True

    def _load(self, number: int, left: int, begun: bool = False) -> None:
        """Have the sums of a group in memory if any process has something left to do with them.

        Args:
            number: of the group.
            left: how many of its targets this process has not eliminated.
            begun: whether all that is to be known of the group is known.
        """
        if self.recollection is None:
            return
        # A process that was killed may have done less than others.
        wanted = any(each for (each,) in self.processes.gather_ints(left))
        if wanted or not (begun or self.recollection.is_finished(number)):
            self.recollection.load(number)

    def _eliminate(self, target: Target, advance: Advance) -> None:
        # Around this alone: what the model computes is the user's to choose.
        with matmul_precision(torch.float32):
            found = self.solver.eliminate(target, self._weights(target), self._pattern, advance)
        self.orders[key_of(target)] = found.order
        self.losses[key_of(target)] = found.losses

    def _has_losses(self, target: Target) -> bool:
        """Return whether a target, or a part of it, is eliminated."""
        return target.name in self.losses or key_of(target) in self.losses

    def _weights(self, target: Target) -> torch.Tensor:
        """Return the weights at the beginning, of this process's blocks of a target or of a part of it."""
        return self.weights[target.name][within(target, self.processes)]

    def allocate(self, config: CAPConfig, sparsity: float) -> list[torch.Tensor]:
        """Return how many units each of this process's blocks gives up, `(n,)` int64 for each target.

        Args:
            config: for the allocation and the selection.
            sparsity: share of all targets' units that are 0 afterwards.
        """
        if config.nm is not None:
            orders = [self.orders[target.name] for target in self.targets]
            return [torch.full(order.shape[:1], order.shape[1], device=order.device) for order in orders]
        unit, paths = unit_of(config.structure), self.compared(config)
        if config.allocation == "global":
            return allocate_global(paths, round(self.num_weights // unit * sparsity), self.processes)
        sizes = [target.weight.numel() // unit for target in self.targets]
        return allocate_uniform(paths, sizes, sparsity, self.processes)

    def compared(self, config: CAPConfig) -> list[torch.Tensor]:
        """Return what the removals of this process's blocks are compared by, as `path_losses`, for each target."""
        unit = unit_of(config.structure)
        return [
            path_losses(self.losses[each.name], zero_units(self.weights[each.name], unit).sum(dim=1), config.selection)
            for each in self.targets
        ]

    def reconstruct(self, counts: Sequence[Sequence[torch.Tensor]], begin: Begin) -> list[tuple[Tensors, torch.Tensor]]:
        """Return what becomes of this process's blocks, and what the changes of all processes' cost, several times.

        Args:
            counts: for each time, and for each target, `(n,)` how many units each block gives up.
            begin: as for `eliminate`.

        Returns:
            For each time, for each target's name the new weights, `(n, B)`; and the losses, `(targets,)`, 0 where there
            is no Fisher.

        Raises:
            CAPError: a block cannot be solved for.
        """
        made = [self.make_tensors(f"pruned-{time}") for time in range(len(counts))]
        losses = torch.zeros(len(counts), len(self.targets), dtype=torch.float64)
        places = {target.name: place for place, target in enumerate(self.targets)}
        # From the last on, whose sums are still there.
        for number, targets in reversed(list(enumerate(self.groups))):
            if self.recollection is not None:
                self.recollection.load(number)
            advance = begin(self.work(targets) * len(counts))
            for target in targets:
                place, rows = places[target.name], within(target, self.processes)
                paths = Elimination(self.orders[target.name][rows], self.losses[target.name][rows])
                each = [count[place][rows] for count in counts]
                solved = self.solver.reconstruct(target, self._weights(target), paths, each, self._pattern, advance)
                for time, (found, loss) in enumerate(solved):
                    made[time][key_of(target)] = found
                    losses[time, place] += loss
        if self.recollection is not None:
            self.recollection.clear()
        join(self.groups, *made)
        return list(zip(made, self.processes.sum(losses), strict=True))

    def removed(
        self, names: Sequence[str], counts: Sequence[torch.Tensor], unit: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and whole weights of some targets: what they give up is 0, all else is as at the beginning.

        Args:
            names: of the targets.
            counts: for each of all targets, `(n,)` how many units each of this process's blocks gives up.
            unit: weights that are removed together.
        """
        for target, each in zip(self.targets, counts, strict=True):
            if target.name in names:
                order = self.orders[target.name].long()
                gone = removal_turns(order, target.block_size, unit) < each.to(order.device)[:, None]
                yield target.name, self._assembled(target, self.weights[target.name].masked_fill(gone, 0))

    def write(self, pruned: Tensors) -> None:
        """Make the new blocks of all processes the targets' weights; all else is as at the beginning.

        Args:
            pruned: as `reconstruct` returns them; taken out one by one.
        """
        # A refit, or new statistics of batch norm, may have come between.
        self.beside.put_back()
        for target in self.targets:
            target.weight.data.copy_(self._assembled(target, pruned.pop(target.name)))

    def put_back(self) -> None:
        """Make all targets, and what is beside them, what they were at the beginning."""
        self.beside.put_back()
        for target in self.targets:
            target.weight.data.copy_(self._assembled(target, self.weights[target.name]))

    def dense_layer(self, target: Target) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight and the bias that a target's layer had at the beginning; for all processes together."""
        bias = target.module.bias
        return self._assembled(target, self.weights[target.name]), None if bias is None else self.beside.values[bias]

    def _assembled(self, target: Target, blocks: torch.Tensor) -> torch.Tensor:
        return target.from_blocks(self.processes.assemble(blocks, block_shares(target, self.processes)))


def check_pattern(targets: Sequence[Target], pattern: Pattern | None) -> None:
    """Raise a CAPError if the blocks of a target are not whole groups of a pattern."""
    if pattern is None:
        return
    for target in targets:
        fit_block_size(target.name, target.module, "row", pattern)
        if target.block_size % pattern.m:
            raise CAPError(
                f"{target.name} was collected in blocks of {target.block_size}, which {pattern} does not divide: "
                f"collect with {'allocation' if isinstance(pattern, NMPattern) else 'pattern'}='{pattern}'"
            )


def with_changes(config: CAPConfig, allocation: str | None, selection: str | None) -> CAPConfig:
    """Return a config with another allocation or selection, as far as they are given."""
    return replace(
        config,
        allocation=config.allocation if allocation is None else allocation,
        selection=config.selection if selection is None else selection,
    )


def held_bytes(target: Target, blocks: int) -> int:
    """Return the bytes of the weights, orders and losses of some blocks of a target."""
    kinds = (target.weight.dtype, order_dtype(target), torch.float32)
    return blocks * target.block_size * sum(kind.itemsize for kind in kinds)


def compared_bytes(target: Target, blocks: int) -> int:
    """Return the bytes of what an allocation compares of some blocks: their paths; as much as their new weights."""
    return blocks * target.block_size * torch.float32.itemsize


def peak_bytes(target: Target, blocks: int) -> int:
    """Return the most bytes in use while paths are made of some blocks: losses, maxima and places in 64 bits each."""
    return 3 * 8 * blocks * target.block_size
