"""The layer of a target: its weight and bias, read and written, and how its outputs lie."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from cap_hf.errors import CAPError
from cap_hf.targets import Target

# Returns the weight and the bias that a target's layer had in the dense model; asked for by all processes together.
DenseLayer = Callable[[Target], tuple[torch.Tensor, torch.Tensor | None]]


def rows_of(target: Target, weight: torch.Tensor) -> torch.Tensor:
    """Return a target's weight, `weight.shape`, as `(out, row)`."""
    return target.to_blocks(weight).reshape(-1, target.row_size)


def layer_of(target: Target) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return copies of the weight and the bias that a target's layer has."""
    bias = target.module.bias
    return target.weight.detach().clone(), None if bias is None else bias.detach().clone()


@torch.no_grad()
def write_layer(target: Target, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a target's layer a weight, and a bias if there is one."""
    target.weight.copy_(weight)
    if target.module.bias is not None and bias is not None:
        target.module.bias.copy_(bias)


@contextmanager
def as_dense(targets: Sequence[Target], dense: DenseLayer) -> Iterator[None]:
    """Have all targets' layers as they were in the dense model, and put them back afterwards."""
    sparse = [layer_of(target) for target in targets]
    try:
        for target in targets:
            write_layer(target, *dense(target))
        yield
    finally:
        for target, layer in zip(targets, sparse, strict=True):
            write_layer(target, *layer)


def channel_dim(module: nn.Module) -> int:
    """Return in which dimension of its output a Linear or a Conv2d has its channels."""
    return 1 if isinstance(module, nn.Conv2d) else -1


def check_unmixed(target: Target, rows: int, examples: int) -> None:
    """Raise a CAPError if the first dimension of a layer's input or output is not so many rows for each example."""
    if rows % examples:
        raise CAPError(
            f"{target.name} mixes examples (its input has {rows} rows for {examples} examples), and cannot be "
            f"refitted: leave it out with --exclude '{target.name}', or take --refit false"
        )
