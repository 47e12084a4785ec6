"""Finds layers whose last target only adds to what they return: there a refit can undo errors that came before it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cap_hf.collection.running import Batch
from cap_hf.targets import Target
from cap_hf.towers import see

# How alike the factor of a channel must be at all positions, relative to the largest of all channels.
ALIKE = 1e-3


@dataclass
class Residual:
    """A layer that returns `r + s y`: y what a target puts out, r what does not depend on y.

    Attributes:
        layer: the outermost module of that kind.
        target: the last of its targets in the forward pass.
        scales: s, `(channels,)`, of a layer scale, or 1.
    """

    layer: nn.Module
    target: str
    scales: torch.Tensor


@dataclass
class _Call:
    """What a target has put out, cut off from the graph before it."""

    target: str
    outputs: torch.Tensor
    channels: int


@dataclass
class _Probe:
    """The hooks that find out, in one forward pass, how what modules return depends on their last target's output."""

    names: dict[nn.Module, str]
    calls: list[_Call] = field(default_factory=list)
    begun: dict[nn.Module, int] = field(default_factory=dict)
    found: dict[str, Residual] = field(default_factory=dict)

    def leaf(self, module: nn.Module, args: tuple[Any, ...], outputs: torch.Tensor) -> torch.Tensor:
        """Have the graph begin anew at a target's output: so nothing goes through the targets after it."""
        leaf = outputs.detach().requires_grad_()
        self.calls.append(_Call(self.names[module], leaf, channel_dim(module)))
        return leaf.clone()

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note how many targets were called before a module."""
        self.begun[module] = len(self.calls)

    def end(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        """Look at what a module returns; what is around it comes later, and takes its place."""
        returned = first_tensor(outputs)
        if returned is None or len(self.calls) == self.begun.pop(module):
            return
        last = self.calls[-1]
        scales = scales_of(returned, last.outputs, last.channels)
        if scales is not None:
            self.found[last.target] = Residual(module, last.target, scales)


def find_residuals(model: nn.Module, targets: Sequence[Target], inputs: Batch) -> list[Residual]:
    """Return the residual layers of a model, as far as their last target is one of those given.

    Args:
        model: within `frozen`.
        targets: each with one module that is called once in a forward pass.
        inputs: examples, of which the first goes through the model.
    """
    probe = _Probe({target.module: target.name for target in targets})
    around = [
        module
        for module in model.modules()
        if module not in probe.names and any(each in probe.names for each in module.modules())
    ]
    with ExitStack() as stack:
        for module in probe.names:
            stack.callback(module.register_forward_hook(probe.leaf).remove)
        for module in around:
            stack.callback(module.register_forward_pre_hook(probe.begin).remove)
            stack.callback(module.register_forward_hook(probe.end).remove)
        with torch.enable_grad():
            see(model, {name: value[:1] for name, value in inputs.items()})
    return list(probe.found.values())


def scales_of(returned: torch.Tensor, outputs: torch.Tensor, channels: int) -> torch.Tensor | None:
    """Return s `(channels,)` where `returned` is `r + s outputs` and r is not 0; None where it is anything else.

    Args:
        returned: of any shape, in a graph or not.
        outputs: a leaf of the graph.
        channels: the dimension of its channels.
    """
    if returned.shape != outputs.shape or not returned.requires_grad:
        return None
    signs = torch.randint(2, outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs) * 2 - 1
    (grads,) = torch.autograd.grad(returned, outputs, signs, retain_graph=True, allow_unused=True)
    if grads is None:
        return None
    factors = (grads * signs).movedim(channels, -1).flatten(0, -2)
    scales = factors[0]
    if not scales.any() or (factors - scales).abs().max() > ALIKE * scales.abs().max():
        return None
    rest = (returned - outputs * along(scales, outputs, channels)).detach()
    return scales if rest.abs().max() > ALIKE * returned.detach().abs().max() else None


def along(scales: torch.Tensor, outputs: torch.Tensor, channels: int) -> torch.Tensor:
    """Return a factor of each channel in a shape that multiplies outputs."""
    shape = [1] * outputs.dim()
    shape[channels] = -1
    return scales.view(shape)


def first_tensor(returned: Any) -> torch.Tensor | None:
    """Return what a layer hands on: what it returns, or the first of a tuple; None where that is no tensor."""
    first = returned[0] if isinstance(returned, tuple) and returned else returned
    return first if isinstance(first, torch.Tensor) else None


def channel_dim(module: nn.Module) -> int:
    """Return in which dimension of its output a Linear or a Conv2d has its channels."""
    return 1 if isinstance(module, nn.Conv2d) else -1
