"""Gradients of single examples through hooks, layer by layer, made row by row where they are needed."""

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import nn
from torch.nn import functional as F

from cap_hf.errors import CAPError
from cap_hf.targets import Target


def unfold_conv(module: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    """The input patches of a convolution: `(b, channels, h, w)` -> `(b, groups, patch, positions)`."""
    # The convolution's own padding in F.pad's order; it covers 'same' and every padding mode.
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(inputs, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return patches.unflatten(1, (module.groups, -1))


class LayerGradients:
    """The gradient samples of one layer's weight, as the two factors they are products of.

    `inputs` are `(samples * groups, positions, row)`, `grads` `(samples * groups, positions, outputs / groups)`;
    their product over the positions is a gradient, whose rows are a target's: channels last for a convolution.

    Args:
        module: a Linear or a Conv2d.
        inputs: what it was called with; Linear `(b, ..., in)`, Conv2d `(b, in, h, w)`. b is a multiple of
            `samples`: windows or groups of one example lie side by side in it.
        grads: gradient of the summed loss with respect to its output.
        samples: how many gradient samples there are.
    """

    def __init__(self, module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor, samples: int) -> None:
        self.samples, self.groups = samples, getattr(module, "groups", 1)
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        inputs, grads = inputs.to(dtype), grads.to(dtype)
        if isinstance(module, nn.Conv2d):
            patches = unfold_conv(module, inputs)
            # From channels, kernel to kernel, channels: `(b, groups, positions, row)`.
            channels = module.weight.shape[1]
            patches = patches.unflatten(2, (channels, -1)).permute(0, 1, 4, 3, 2).flatten(3)
            grads = grads.flatten(2).unflatten(1, (self.groups, -1)).mT
            # The examples of a sample side by side: `(samples, groups, examples * positions, ...)`.
            patches, grads = (each.unflatten(0, (samples, -1)).transpose(1, 2) for each in (patches, grads))
            self.inputs, self.grads = (each.flatten(2, 3).flatten(0, 1) for each in (patches, grads))
        else:
            self.inputs = inputs.reshape(samples, -1, inputs.shape[-1])
            self.grads = grads.reshape(samples, -1, grads.shape[-1])

    def add(self, other: "LayerGradients") -> None:
        """Take in another call of the same module on the same examples: the gradient is the sum over both."""
        self.inputs = torch.cat([self.inputs, other.inputs], dim=1)
        self.grads = torch.cat([self.grads, other.grads], dim=1)

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write the gradients of the weight's rows from `start` to `stop` to `out`, `(samples, stop - start, row)`."""
        if self.groups == 1:
            torch.bmm(self.grads[:, :, start:stop].mT, self.inputs, out=out)
            return
        # Rows of a grouped convolution are short: all of the groups that they lie in cost little.
        height = self.grads.shape[-1]
        first, last = start // height, -(-stop // height)
        inputs, grads = (each.unflatten(0, (self.samples, -1))[:, first:last] for each in (self.inputs, self.grads))
        out.copy_((grads.mT @ inputs).flatten(1, 2)[:, start - first * height : stop - first * height])


class StepGradients:
    """The gradient samples of one layer in a whole step, whose examples went through the model in parts."""

    def __init__(self, parts: Sequence[LayerGradients]) -> None:
        self.parts = parts
        self.samples = sum(part.samples for part in parts)

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """As of `LayerGradients`, the samples of all parts in order."""
        done = 0
        for part in self.parts:
            part.rows(start, stop, out[done : done + part.samples])
            done += part.samples


class GradientSamples:
    """Hooks that hand over each target's gradient samples during the backward pass, one target at a time.

    Inside the context call `start(samples)`, the model's forward, and backward on the summed loss; weights need no
    `requires_grad`: the graph begins at the first targets' outputs. A module that is called several times in one
    forward gives one gradient, the sum over its calls. Between `start(samples, last=False)` and the next start
    gradients are kept, to be handed over with those of the last part of the step.

    Args:
        targets: whose gradients are wanted.
        sink: called with the target and its gradients.
    """

    def __init__(self, targets: Sequence[Target], sink: Callable[[Target, StepGradients], None]) -> None:
        self.targets, self.sink = targets, sink
        self.samples = 0
        self.seen: set[str] = set()
        self._part, self._last = 0, True
        self._calls: dict[str, int] = {}
        # Of each target, by part and call: its inputs, the gradients of its outputs, and the samples in these. The
        # factors made of them can take many times as much (the patches of a convolution).
        self._kept: dict[str, dict[int, list[tuple[torch.Tensor, torch.Tensor, int]]]] = {}
        self._handles: list = []

    def start(self, samples: int, last: bool = True) -> None:
        """Go on with the next part of a step, which holds `samples` gradient samples; after the last begins another."""
        if self._last:
            self._kept.clear()
        self._part += 1
        self.samples, self._last = samples, last
        self._calls.clear()

    def __enter__(self) -> "GradientSamples":
        for target in self.targets:
            self._handles.append(target.module.register_forward_hook(self._forward_hook(target)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._kept.clear()

    def _forward_hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            inputs = args[0].detach()
            if len(inputs) % self.samples:
                raise CAPError(
                    f"{target.name} mixes examples (its input has {len(inputs)} rows for {self.samples} gradient "
                    f"samples): leave it out with --exclude '{target.name}'"
                )
            self.seen.add(target.name)
            self._calls[target.name] = self._calls.get(target.name, 0) + 1
            if not output.requires_grad:
                # Nothing before this needs a gradient. A copy, because no one may write into a leaf.
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda grads: self._backward(target, inputs, grads))
            return output

        return hook

    def _backward(self, target: Target, inputs: torch.Tensor, grads: torch.Tensor) -> None:
        calls = self._kept.setdefault(target.name, {}).setdefault(self._part, [])
        calls.append((inputs, grads.detach(), self.samples))
        self._calls[target.name] -= 1
        if self._calls[target.name] or not self._last:
            return
        parts = []
        for calls in self._kept.pop(target.name).values():
            parts.append(LayerGradients(target.module, *calls[0]))
            for call in calls[1:]:
                parts[-1].add(LayerGradients(target.module, *call))
        self.sink(target, StepGradients(parts))


def labels_for(logits: torch.Tensor, labels: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """The data's labels, or labels drawn from the model's own distribution by inverting its cumulative sum.

    Args:
        logits: `(b, classes)`.
        labels: `(b,)`.
        uniforms: None for the data's labels, else `(b,)` in [0, 1), one number an example.
    """
    if uniforms is None:
        return labels
    cumulative = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms.to(cumulative)[:, None])[:, 0]
    return drawn.clamp_max(logits.shape[-1] - 1)
