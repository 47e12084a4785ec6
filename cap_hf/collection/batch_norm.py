"""Estimates the statistics of batch norm layers anew, from calibration examples: a pruned model has other activations.

A layer's mean and variance are those of what reaches it once all layers before it have theirs. Averages of batches in
training mode, the usual practice, depend on the batch size and on the order of the examples; here all examples of all
processes go through the model as one batch, and a layer is finished before what follows it is computed.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cap_hf.collection.batches import joined
from cap_hf.collection.running import Batch, frozen, unchanged_on_error
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.towers import see

# So many give nearly as good statistics as four times as many (docs/results.md), and fit into memory: all of them go
# through the model at once.
NUM_EXAMPLES = 256


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return every batch norm layer of a model that keeps statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def statistics_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the means and variances of every batch norm layer of a model that keeps them."""
    buffers = [buffer for layer in batch_norms(model).values() for buffer in (layer.running_mean, layer.running_var)]
    return [buffer for buffer in buffers if buffer is not None]


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Batch], processes: Processes) -> list[str]:
    """Give every batch norm layer the mean and variance of what reaches it, over all examples and positions.

    The variance is the unbiased one, as training keeps it. Nothing else of the model changes: it runs in eval mode,
    without gradients, and its modes are put back. A layer that is called several times has the statistics of all
    its calls so far.

    Args:
        model: on the device of the processes.
        batches: this process's own. All of its examples are in memory at once, with the activations of one layer: a
            few hundred do.
        processes: of the run; every process has an example at least.

    Returns:
        The names of the layers that were reached; the others keep what they had.

    Raises:
        CAPError: the model has no such layer, a process has no example, or an activation is not finite; then the
            statistics are what they were.
    """
    layers = batch_norms(model)
    if not layers:
        raise CAPError(f"{type(model).__name__} has no batch norm layer whose statistics could be estimated anew")
    inputs = joined(batches)
    counts = [count for (count,) in processes.gather_ints(len(next(iter(inputs.values()))) if inputs else 0)]
    if not all(counts):
        raise CAPError("batch norm is estimated from one example per process at least: give more of them")
    reached: dict[str, _Statistics] = {}

    def hook(name: str, layer: _BatchNorm, activations: torch.Tensor) -> None:
        statistics = _Statistics.of(activations, processes)
        if name in reached:
            statistics = reached[name].joined(statistics)
        if not statistics.finite:
            raise CAPError(
                f"what reaches the batch norm layer {name} is not finite: its statistics cannot be estimated"
            )
        reached[name] = statistics
        statistics.write_to(layer)

    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: hook(name, layer, args[0]))
        for name, layer in layers.items()
    ]
    try:
        with frozen(model), unchanged_on_error(statistics_of(model)), torch.no_grad():
            see(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name in reached]


class _Statistics:
    """Count, mean and summed squared deviation of the channels of some activations, in float64.

    Args:
        count: of examples and positions.
        mean: `(channels,)`.
        squares: `(channels,)`, summed squared deviations from the mean.
    """

    def __init__(self, count: float, mean: torch.Tensor, squares: torch.Tensor) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    @classmethod
    def of(cls, activations: torch.Tensor, processes: Processes) -> "_Statistics":
        """Return those of all processes' activations, `(examples, channels, ...)`."""
        values = activations.transpose(0, 1).flatten(1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        variance, mean = torch.var_mean(values, 1, correction=0)
        own = cls(values.shape[1], mean.double(), variance.double() * values.shape[1])
        count = float(processes.sum(torch.tensor(float(own.count), dtype=torch.float64)))
        mean = processes.sum(own.mean * own.count) / count
        # Deviations from the common mean: differences of large sums of squares would lose what is small.
        return cls(count, mean, processes.sum(own.squares + own.count * (own.mean - mean).square()))

    @property
    def finite(self) -> bool:
        """Return whether every number is."""
        return bool(self.mean.isfinite().all() and self.squares.isfinite().all())

    def joined(self, other: "_Statistics") -> "_Statistics":
        """Return those of these activations and of further ones."""
        count, difference = self.count + other.count, other.mean - self.mean
        squares = self.squares + other.squares + difference.square() * (self.count * other.count / count)
        return _Statistics(count, self.mean + difference * (other.count / count), squares)

    def write_to(self, layer: _BatchNorm) -> None:
        """Make them a layer's."""
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.squares / max(self.count - 1, 1))
