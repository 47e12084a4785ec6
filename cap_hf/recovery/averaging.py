"""Average the weights over training, exponentially; the average has the model's own zeros."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cap_hf.errors import CAPError, reason

AVERAGE_NAME = "ema.safetensors"

# How torch hands over what is averaged together.
Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


class WeightAverage:
    """torch's `AveragedModel` over one cycle of training.

    The average of weights that are all 0 is 0, so masks hold by themselves as long as they do not change. A pruning
    step changes them, and moves the weights that are kept as well: `restart` begins a new average there.

    Args:
        model: what is averaged; copied.
        decay: of the average, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        average = get_ema_multi_avg_fn(decay)

        def update(averages: Tensors, values: Tensors, count: torch.Tensor | int) -> None:
            # torch would round the average of whole numbers, such as the ids of positions, towards 0.
            if averages[0].is_floating_point():
                average(averages, values, count)
            else:
                torch._foreach_copy_(list(averages), list(values))

        # Running statistics of batch norms are averaged as well: they belong to the weights.
        self.averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self.averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """Return the averaged model; its weights say something once `update` was called."""
        return self.averaged.module

    @property
    def started(self) -> bool:
        """Return whether `update` was called since the average began."""
        return int(self.averaged.n_averaged) > 0

    def update(self, model: nn.Module) -> None:
        """Take the model's weights in: as they are if these are the first, else with the decay."""
        self.averaged.update_parameters(model)

    def restart(self) -> None:
        """Forget the average; the next `update` begins a new one."""
        self.averaged.n_averaged.zero_()

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and buffers with the average's, in place."""
        for own, other in zip(
            chain(model.parameters(), model.buffers()),
            chain(self.model.parameters(), self.model.buffers()),
            strict=True,
        ):
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the context the model has the averaged weights, if there are any yet."""
        if not self.started:
            yield
            return
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    def save(self, directory: str | Path) -> None:
        """Write the average into a folder."""
        save_model(self.averaged, str(Path(directory) / AVERAGE_NAME))

    def load(self, directory: str | Path) -> None:
        """Read the average from a folder, if it has one.

        Raises:
            CAPError: it is not this model's average, or damaged.
        """
        path = Path(directory) / AVERAGE_NAME
        if not path.exists():
            return
        try:
            load_model(self.averaged, str(path))
        except Exception as error:  # file format, names, shapes
            raise CAPError(f"{path} cannot be loaded: {reason(error)}") from error
