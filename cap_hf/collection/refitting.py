"""Takes the dense and the sparse model through one forward pass together, and refits each sparse layer on the way.

The batch is all examples twice. Of every activation the first half belongs to the dense model and the second to the
sparse one: a target's hooks have it compute the first half with the dense weights, refit the sparse ones to that (see
`cap_hf.method.refit`), and compute the second half with these. What lies between the targets takes the two halves as it
takes any batch. So a layer is refitted for what the layers before it, sparse and refitted, really give; layers that
read the same, such as q, k and v, are refitted for the same.

The last target of a residual layer, which only adds to what the layer returns, is refitted when the layer ends: to what
makes that equal to the dense model's, so that it undoes errors of the layers before it too.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from cap_hf.collection.batches import joined
from cap_hf.collection.fitting import fitting, num_examples
from cap_hf.collection.layers import DenseLayer, as_dense, channel_dim, check_unmixed, layer_of, rows_of, write_layer
from cap_hf.collection.precision import matmul_precision
from cap_hf.collection.relevance import Relevance
from cap_hf.collection.residuals import Residual, along, find_residuals, first_tensor
from cap_hf.collection.resources import Resources
from cap_hf.collection.room import available_bytes
from cap_hf.collection.running import Batch, differentiable, frozen
from cap_hf.collection.solver import default_batch_bytes
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.masks import zero_units
from cap_hf.method.allocation import allocate, path_losses, removal_turns
from cap_hf.method.inverses import NotInvertibleError
from cap_hf.method.methods import METHODS
from cap_hf.method.panels import LostPivotError, num_steps
from cap_hf.method.reconstruction import reconstruct
from cap_hf.method.refit import LayerPairs, LeastSquares
from cap_hf.patterns import unit_of
from cap_hf.report import RefitReport
from cap_hf.targets import Target, summarize
from cap_hf.towers import see

logger = logging.getLogger(__name__)

# Of the largest layer scale, what a channel's must be above for its errors to be made up for.
LEAST = 1e-3


def refit(
    model: nn.Module,
    targets: Sequence[Target],
    dense: DenseLayer,
    batches: Iterable[tuple[Batch, int]],
    config: CAPConfig,
    processes: Processes,
    on_layer: Callable[[int, float], None] = lambda count, work: None,
    resources: Resources | None = None,
    relevance: Relevance | None = None,
) -> RefitReport:
    """Refit the weights that are left in some targets, and biases, to what the dense model's layers make, in place.

    Zeros stay, unless the method is sequential: then as many are chosen anew in each layer. A layer whose module is
    called several times, or never, or shares its weight with another one stays as it is.

    Args:
        model: pruned, on the device of the processes.
        targets: of the model.
        dense: gives their layers as they were.
        batches: this process's own, and where each begins among all processes' examples. All of its examples are in
            memory at once, twice, with the activations of one layer: a few hundred do.
        config: for the ridge, for the number of examples that were asked for, and for the loss that weighs positions.
        processes: of the run; every process has an example at least.
        on_layer: told after each target that is refitted: 1, and how much work it was (`work_of`).
        resources: memory that may be taken; fewer examples are refitted to where all of them would take more.
        relevance: of the dense model, which further refits take too; None for one of this refit alone.

    Returns:
        What was done.

    Raises:
        CAPError: a process has no example, a layer mixes examples, an activation or a gradient is not finite, the model
            returns neither logits nor features, or a layer cannot be solved for; layers may have been changed then,
            see `unchanged_on_error`.
    """
    own = list(batches)
    counts = [count for (count,) in processes.gather_ints(num_examples(own))]
    if not all(counts):
        raise CAPError("layers are refitted to one example per process at least: give more of them")
    if sum(counts) < config.refit_examples:
        logger.warning("The data ended after %d of %d examples to refit to.", sum(counts), config.refit_examples)
    if resources is not None:
        own = fitting(own, model, available_bytes(resources, processes.device))
    places = [start + each for batch, start in own for each in range(len(batch["pixel_values"]))]
    done = sum(count for (count,) in processes.gather_ints(len(places)))
    if done < sum(counts):
        logger.warning("Refitting to %d of %d examples: more do not fit into memory.", done, sum(counts))
    with differentiable(model), frozen(model), torch.no_grad(), matmul_precision(torch.float32):
        # In here, because no gradient goes through what was joined inside `torch.inference_mode()`.
        inputs = joined(batch for batch, _ in own)
        chosen = refittable(model, targets, inputs)
        layers = [target for target in targets if target.name in chosen]
        residuals = find_residuals(model, layers, inputs, processes)
        with as_dense(targets, dense):
            of_positions = (relevance or Relevance()).position_weights
            weights = of_positions(model, layers, inputs, torch.tensor(places), config, processes)
        walk = _Walk(targets, weights, residuals, dense, len(places), config, processes, on_layer)
        with walk.listening():
            see(model, {name: torch.cat([value, value]) for name, value in inputs.items()})
    left = [target.name for target in targets if target.name not in chosen]
    if left:
        logger.warning("Not refitted, because not one module calls its weight exactly once: %s.", summarize(left, 3))
    return RefitReport(done, config.refit_ridge, left)


def refittable(model: nn.Module, targets: Sequence[Target], inputs: Batch) -> set[str]:
    """Return the names of the targets with one module that is called once in a forward pass.

    Args:
        model: within `frozen`.
        targets: of the model.
        inputs: examples, of which the first goes through the model.
    """
    calls: list[str] = []
    with ExitStack() as stack:
        for target in targets:
            for module in target.modules:
                handle = module.register_forward_hook(lambda *_, name=target.name: calls.append(name))
                stack.callback(handle.remove)
        see(model, {name: value[:1] for name, value in inputs.items()})
    return {target.name for target in targets if calls.count(target.name) == len(target.modules) == 1}


def parameters_of(targets: Sequence[Target]) -> list[torch.Tensor]:
    """Return what a refit of some targets may change: their weights, and the biases of their layers."""
    biases = [target.module.bias for target in targets if target.module.bias is not None]
    return [*(target.weight for target in targets), *biases]


def work_of(target: Target) -> float:
    """Return what a target takes to refit, in multiplications but for a factor."""
    return len(target.weight) * float(target.row_size) ** 3


class _Walk:
    """The hooks of one forward pass of both models, on the targets' modules."""

    def __init__(
        self,
        targets: Sequence[Target],
        weights: Mapping[str, torch.Tensor],
        residuals: Mapping[str, Residual],
        dense: DenseLayer,
        examples: int,
        config: CAPConfig,
        processes: Processes,
        on_layer: Callable[[int, float], None],
    ) -> None:
        # Those with weights of their positions are refitted, the last ones of residual layers when these end.
        self.targets, self.weights, self.residuals = targets, weights, residuals
        self.dense, self.examples = dense, examples
        self.config, self.processes, self.on_layer = config, processes, on_layer
        # Of the module that is being called: what the sparse model gives it, and what it is in that.
        self._sparse: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None
        # Of the residual layers that have not ended: what their last target takes, and both halves of what it makes.
        self._open: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have the hooks on the targets' modules."""
        with ExitStack() as stack:
            for target in self.targets:
                for module in target.modules:
                    stack.callback(module.register_forward_pre_hook(self._before(target)).remove)
                    stack.callback(module.register_forward_hook(self._after(target)).remove)
                if target.name in self.residuals:
                    residual = self.residuals[target.name]
                    stack.callback(residual.layer.register_forward_hook(self._ended(target, residual)).remove)
            yield

    def _before(self, target: Target) -> Callable:
        """Have a module take the dense model's half, as it is in that."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            inputs = args[0]
            check_unmixed(target, len(inputs), 2 * self.examples)
            half, (weight, bias) = len(inputs) // 2, self.dense(target)
            self._sparse = (inputs[half:], *layer_of(target))
            write_layer(target, weight, bias)
            return (inputs[:half], *args[1:])

        return hook

    def _after(self, target: Target) -> Callable:
        """Make a module sparse again, refitted to what it has made; then it takes the sparse model's half."""

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
            assert self._sparse is not None
            inputs, weight, bias = self._sparse
            self._sparse = None
            write_layer(target, weight, bias)
            if target.name in self.weights and target.name not in self.residuals:
                self._refit(target, module, inputs, outputs)
            made = module.forward(inputs)
            if target.name in self.residuals:
                self._open[target.name] = inputs, outputs, made
            return torch.cat([outputs, made])

        return hook

    def _ended(self, target: Target, residual: Residual) -> Callable:
        """Refit the last target of a residual layer to what makes the layer's sparse half equal to its dense one."""

        def hook(layer: nn.Module, args: tuple[torch.Tensor, ...], returned: Any) -> Any:
            if target.name not in self._open:
                # A call of the layer that does without its last target.
                return returned
            first, (inputs, outputs, made) = first_tensor(returned), self._open.pop(target.name)
            assert first is not None
            half, channels = len(first) // 2, channel_dim(target.module)
            scales = along(residual.scales, made, channels)
            # A channel that the layer leaves out can make up for nothing.
            reached = scales.abs() > LEAST * scales.abs().max()
            wanted = torch.where(reached, made + (first[:half] - first[half:]) / scales, outputs)
            self._refit(target, target.module, inputs, wanted)
            moved = first[half:] + scales * (target.module.forward(inputs) - made)
            first = torch.cat([first[:half], moved])
            return (first, *returned[1:]) if isinstance(returned, tuple) else first

        return hook

    def _refit(self, target: Target, module: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        problem = self._problem(target, module, inputs, outputs)
        if not problem.finite:
            raise CAPError(
                f"what reaches {target.name}, what it makes of it, or the gradient there, is not finite: it cannot be "
                "refitted; check the pixel values, or take --refit false"
            )
        shares = self.processes.shares(len(target.weight), target.index)
        own, anchors, ridge = shares[self.processes.rank], rows_of(target, target.weight), self.config.refit_ridge
        keep, size = anchors[own] != 0, default_batch_bytes(anchors.device)
        try:
            if METHODS[self.config.method].sequential:
                zeros = int(zero_units(anchors, unit_of(self.config.structure)).sum())
                anchors = rows_of(target, self.dense(target)[0])
                keep = self._choose(problem, anchors, own, zeros)
            part = problem.weights(anchors, keep, own, ridge, size)
        except (NotInvertibleError, LostPivotError) as error:
            raise CAPError(
                f"the inputs of {target.name} are too alike to refit it with refit_ridge={ridge:g}: raise it"
            ) from error
        rows = self.processes.assemble(part.to(anchors.dtype), shares)
        write_layer(target, target.from_blocks(rows), None if module.bias is None else problem.biases(rows))
        self.on_layer(1, work_of(target))

    def _choose(self, problem: LeastSquares, dense: torch.Tensor, own: slice, zeros: int) -> torch.Tensor:
        """Return which weights of this process's rows stay where a layer gives up so many units, `(n, row)` bool."""
        config, size = self.config, dense.shape[1]
        alive, pattern = dense[own] != 0, config.structure
        steps, unit = num_steps(size, pattern), unit_of(pattern)
        whole = bool(alive.all())
        order = torch.empty(len(alive), steps, dtype=torch.int64, device=dense.device)
        losses = torch.empty(order.shape, dtype=torch.float64, device=dense.device)
        step = problem.rows_at_once(default_batch_bytes(dense.device), copied=not whole)
        for part, best, matrices in problem.quadratics(dense, own, config.refit_ridge, step):
            old = best if whole else reconstruct(best, matrices, alive[part])
            found = METHODS[config.method].eliminate(old, matrices, pattern)
            order[part], losses[part] = found.order, found.losses
        counts = order.new_full(order.shape[:1], steps)
        if config.nm is None:
            path = path_losses(losses, zero_units(dense[own], unit).sum(dim=1), config.selection)
            ((counts,),) = allocate([[path]], [zeros], self.processes)
        return (removal_turns(order, size, unit) >= counts[:, None]) & alive

    def _problem(self, target: Target, module: nn.Module, inputs: torch.Tensor, outputs: torch.Tensor) -> LeastSquares:
        """Return a layer's problem over the positions of all processes' examples."""
        pairs = LayerPairs(target, module, inputs, outputs, self.weights[target.name])
        count, *sums = (self.processes.sum(each) for each in pairs.sums())
        means = [each / count if module.bias is not None else torch.zeros_like(each) for each in sums]
        products = [self.processes.sum(each) / count for each in pairs.products(*means)]
        return LeastSquares(*means, *products)
