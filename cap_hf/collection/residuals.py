"""Finds layers whose last target only adds to what they return: there a refit can undo errors that came before it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cap_hf.collection.layers import channel_dim
from cap_hf.collection.running import Batch
from cap_hf.distributed.processes import Processes
from cap_hf.targets import Target
from cap_hf.towers import see

# How alike the factor of a channel must be at all positions, relative to the largest of all channels; and how much what
# is added to must vary, relative to the largest entry of the sum.
ALIKE = 1e-3
# Examples of a process that this is found out with. At the one position of a 1x1 map many things look like a factor.
PROBED = 4


@dataclass
class Residual:
    """A layer that returns `r + s y`: y what its last target puts out, r what varies and does not depend on y.

    Attributes:
        layer: the outermost module of that kind. It returns a tensor, or a tuple that begins with it, of which nothing
            else depends on y.
        scales: s, `(channels,)`, of a layer scale, or 1.
    """

    layer: nn.Module
    scales: torch.Tensor


@dataclass
class _Probe:
    """The hooks that find out, in one forward pass, how what modules return depends on their last target's output.

    Attributes:
        names: of the targets' modules.
        calls: the modules that were called, and what they have put out, cut off from the graph before it.
        begun: of the modules around them that are being called, how many calls there were before.
        found: for the names of targets the layers that they are the last of.
    """

    names: dict[nn.Module, str]
    calls: list[tuple[nn.Module, torch.Tensor]] = field(default_factory=list)
    begun: dict[nn.Module, int] = field(default_factory=dict)
    found: dict[str, Residual] = field(default_factory=dict)

    def leaf(self, module: nn.Module, args: tuple[Any, ...], outputs: torch.Tensor) -> torch.Tensor:
        """Have the graph begin anew at a target's output: so nothing goes through the targets after it."""
        leaf = outputs.detach().requires_grad_()
        self.calls.append((module, leaf))
        # A copy, because no one may write into a leaf.
        return leaf.clone()

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note how many targets were called before a module."""
        self.begun[module] = len(self.calls)

    def end(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        """Look at what a module returns; what is around it comes later, and takes its place."""
        if len(self.calls) > self.begun.pop(module):
            last, outputs = self.calls[-1]
            scales = scales_of(returned, outputs, channel_dim(last))
            if scales is not None:
                self.found[self.names[last]] = Residual(module, scales)


def find_residuals(
    model: nn.Module, targets: Sequence[Target], inputs: Batch, processes: Processes
) -> dict[str, Residual]:
    """Return the residual layers of a model by the name of their last target, as far as that is one of those given.

    Args:
        model: within `frozen`.
        targets: each with one module that is called once in a forward pass.
        inputs: examples of this process, of which the first few go through the model.
        processes: of the run; what not all of them find is none.
    """
    probe = _Probe({target.module: target.name for target in targets})
    modules = list(model.modules())
    around = [
        module
        for module in modules
        if module not in probe.names and any(each in probe.names for each in module.modules())
    ]
    with ExitStack() as stack:
        for module in probe.names:
            stack.callback(module.register_forward_hook(probe.leaf).remove)
        for module in around:
            stack.callback(module.register_forward_pre_hook(probe.begin).remove)
            stack.callback(module.register_forward_hook(probe.end).remove)
        with torch.enable_grad():
            see(model, {name: value[:PROBED] for name, value in inputs.items()})
    found, numbers = probe.found, {module: number for number, module in enumerate(modules)}
    own = [numbers[found[each.name].layer] if each.name in found else -1 for each in targets]
    same = [len(set(each)) == 1 for each in zip(*processes.gather_ints(*own), strict=True)]
    return {
        target.name: found[target.name]
        for target, agreed in zip(targets, same, strict=True)
        if agreed and target.name in found
    }


def scales_of(returned: Any, outputs: torch.Tensor, channels: int) -> torch.Tensor | None:
    """Return s `(channels,)` where a layer returns `r + s outputs`, r varying; None where it is anything else.

    Args:
        returned: in a graph or not.
        outputs: a leaf of the graph.
        channels: the dimension of its channels.
    """
    first = first_tensor(returned)
    if first is None or first.shape != outputs.shape:
        return None
    signs = torch.randint(2, outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs) * 2 - 1
    grads = pulled(first, outputs, signs)
    if grads is None or any(pulled(each, outputs, torch.ones_like(each)) is not None for each in beside(returned)):
        return None
    # Random signs: whatever mixes positions or channels gives other factors at each position.
    factors = by_position(grads * signs, channels)
    scales = factors[0]
    if not scales.any() or (factors - scales).abs().max() > ALIKE * scales.abs().max():
        return None
    rest = by_position(first.detach() - outputs.detach() * along(scales, outputs, channels), channels)
    varies = (rest - rest[0]).abs().max() > ALIKE * first.detach().abs().max()
    return scales if varies else None


def pulled(tensor: torch.Tensor, leaf: torch.Tensor, grads: torch.Tensor) -> torch.Tensor | None:
    """Return what gradients of a tensor make for a leaf of its graph; None where it does not depend on that."""
    if not tensor.requires_grad:
        return None
    return torch.autograd.grad(tensor, leaf, grads, retain_graph=True, allow_unused=True)[0]


def by_position(outputs: torch.Tensor, channels: int) -> torch.Tensor:
    """Return outputs as `(positions, channels)`."""
    return outputs.movedim(channels, -1).flatten(0, -2)


def along(scales: torch.Tensor, outputs: torch.Tensor, channels: int) -> torch.Tensor:
    """Return a factor of each channel in a shape that multiplies outputs."""
    shape = [1] * outputs.dim()
    shape[channels] = -1
    return scales.view(shape)


def first_tensor(returned: Any) -> torch.Tensor | None:
    """Return what a layer hands on: what it returns, or the first of a tuple; None where that is no tensor."""
    first = returned[0] if type(returned) is tuple and returned else returned
    return first if isinstance(first, torch.Tensor) else None


def beside(returned: Any) -> list[torch.Tensor]:
    """Return the tensors that a layer returns in a tuple after the first."""
    rest = returned[1:] if isinstance(returned, tuple) else ()
    return [each for each in rest if isinstance(each, torch.Tensor)]
