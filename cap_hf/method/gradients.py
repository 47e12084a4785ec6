"""Gradients of single examples through hooks, layer by layer, made row by row where they are needed."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import nn
from torch.nn import functional as F

from cap_hf.errors import CAPError
from cap_hf.targets import Target

# Bytes of a convolution's patches that are made at a time. They can be many times the input: nine times for a 3x3.
PATCH_BYTES = 16 * 2**20


def unfold_conv(module: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    """Return a convolution's input patches in a target's order: `(b, in, h, w)` -> `(b, groups, positions, row)`.

    A row has the kernel's height and width first and the input channels of a group last.
    """
    # The convolution's own padding in F.pad's order; it covers 'same' and every padding mode.
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(inputs, module.kernel_size, dilation=module.dilation, stride=module.stride)
    channels = module.weight.shape[1]
    return patches.unflatten(1, (module.groups, channels, -1)).permute(0, 1, 4, 3, 2).flatten(3)


def unfold_parts(
    module: nn.Conv2d, inputs: torch.Tensor, outputs: torch.Tensor, group: int = 1
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the patches of so many examples at a time that they take `PATCH_BYTES`, or one group at least.

    Args:
        module: a convolution.
        inputs: `(b, in, h, w)`.
        outputs: what it made of them, `(b, out, h', w')`, or a gradient of that.
        group: how many examples are never separated.
    """
    size = outputs[0, 0].numel() * module.weight[0].numel() * module.groups * inputs.element_size()
    step = max(1, PATCH_BYTES // max(size * group, 1)) * group
    for start in range(0, len(inputs), step):
        part = slice(start, min(start + step, len(inputs)))
        yield part, unfold_conv(module, inputs[part])


def making_bytes(sample: int) -> int:
    """Return the most bytes in use while patches are made, of examples of which each has `sample` bytes of them.

    They are there as unfolded, in a target's order, and as the padded input, which is no larger.
    """
    return 3 * max(sample, PATCH_BYTES) if sample else 0


class LayerGradients:
    """The gradient samples of one layer's weight in one call of its module.

    A gradient is the product of what went in and of the gradient of what came out, summed over the positions (tokens,
    pixels) of all examples of the sample; its rows are the target's. Of a convolution either the patches that went in
    are held or the gradients themselves, whichever takes less.

    Args:
        target: whose gradients they are.
        module: the one of its modules that was called.
        inputs: what it was called with; Linear `(b, ..., in)`, Conv2d `(b, in, h, w)`. b is a multiple of
            `samples`: windows or groups of one example lie side by side in it.
        grads: gradient of the summed loss with respect to its output.
        samples: how many gradient samples there are.
    """

    def __init__(
        self, target: Target, module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor, samples: int
    ) -> None:
        self.target, self.module, self.samples, self.examples = target, module, samples, len(inputs) // samples
        self.groups = getattr(module, "groups", 1)
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        self.inputs, self.grads = inputs.to(dtype), grads.to(dtype)
        self._whole: torch.Tensor | None = None
        self._patches: torch.Tensor | None = None

    @property
    def positions(self) -> int:
        """Return how many positions a gradient sample is a sum over."""
        width = self.grads.shape[1] if self.target.is_conv else self.grads.shape[-1]
        return self.grads.numel() // width // self.samples

    @property
    def patch_bytes(self) -> int:
        """Return the bytes of one gradient sample's patches; 0 of a Linear, which needs none."""
        entries = self.positions * self.groups * self.target.row_size if self.target.is_conv else 0
        return entries * self.inputs.element_size()

    @property
    def held_bytes(self) -> int:
        """Return the bytes that are held of one gradient sample beside its inputs and output gradients."""
        whole = self.target.weight.numel() * self.inputs.element_size()
        return min(self.patch_bytes, whole)

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write the gradients of the weight's rows from `start` to `stop` to `out`, `(samples, stop - start, row)`."""
        if not self.target.is_conv:
            inputs = self.inputs.reshape(self.samples, -1, self.inputs.shape[-1])
            grads = self.grads.reshape(self.samples, -1, self.grads.shape[-1])
            torch.bmm(grads[:, :, start:stop].mT, inputs, out=out)
        elif len(self.target.weight) <= self.positions * self.groups:
            if self._whole is None:
                self._whole = self._make_whole()
            out.copy_(self._whole[:, start:stop])
        else:
            if self._patches is None:
                self._patches = self._make_patches()
            # Rows of a grouped convolution are short: all of the groups that they lie in cost little.
            height = len(self.target.weight) // self.groups
            first, last = start // height, -(-stop // height)
            patches = self._patches[:, first:last].flatten(0, 1)
            grads = self._by_group(self.grads)[:, first:last].flatten(0, 1)
            begin = start - first * height
            if last - first == 1:
                torch.bmm(grads[:, :, begin : begin + stop - start].mT, patches, out=out)
                return
            made = (grads.mT @ patches).unflatten(0, (self.samples, -1)).flatten(1, 2)
            out.copy_(made[:, begin : begin + stop - start])

    def _by_group(self, grads: torch.Tensor) -> torch.Tensor:
        """Return output gradients of whole samples as `(samples, groups, positions, outputs / groups)`."""
        return self._side_by_side(grads.flatten(2).unflatten(1, (self.groups, -1)).mT)

    def _side_by_side(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put the examples of a sample beside each other: `(b, groups, p, n)` -> `(samples, groups, .. * p, n)`."""
        return tensor.unflatten(0, (-1, self.examples)).transpose(1, 2).flatten(2, 3)

    def _patch_parts(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield some samples at a time: which they are, which examples, their patches `(n, groups, positions, row)`."""
        assert isinstance(self.module, nn.Conv2d)  # a Linear has no patches
        for part, patches in unfold_parts(self.module, self.inputs, self.grads, self.examples):
            yield slice(part.start // self.examples, part.stop // self.examples), part, self._side_by_side(patches)

    def _make_patches(self) -> torch.Tensor:
        made = self.inputs.new_empty(self.samples, self.groups, self.positions, self.target.row_size)
        for samples, _, patches in self._patch_parts():
            made[samples] = patches
        return made

    def _make_whole(self) -> torch.Tensor:
        made = self.inputs.new_empty(self.samples, len(self.target.weight), self.target.row_size)
        for samples, examples, patches in self._patch_parts():
            made[samples] = (self._by_group(self.grads[examples]).mT @ patches).flatten(1, 2)
        return made


class StepGradients:
    """The gradient samples of one layer in a whole step, from several microbatches and calls of its module.

    Args:
        parts: by microbatch, the calls of the module in it; a gradient is the sum over the calls.
    """

    def __init__(self, parts: Sequence[Sequence[LayerGradients]]) -> None:
        self.parts = parts
        self.samples = sum(calls[0].samples for calls in parts)

    @property
    def patch_bytes(self) -> int:
        """Return the bytes of one gradient sample's patches in one call."""
        return max(call.patch_bytes for call in self.parts[0])

    @property
    def held_bytes(self) -> int:
        """Return the bytes that all calls hold of one gradient sample beside its inputs and output gradients."""
        return sum(call.held_bytes for call in self.parts[0])

    @property
    def positions(self) -> int:
        """Return how many positions a gradient sample is a sum over, in all calls together."""
        return sum(call.positions for call in self.parts[0])

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write as `LayerGradients.rows` does, the samples of all microbatches in order."""
        done = 0
        for calls in self.parts:
            part = out[done : done + calls[0].samples]
            calls[0].rows(start, stop, part)
            for call in calls[1:]:
                more = torch.empty_like(part)
                call.rows(start, stop, more)
                part += more
            done += calls[0].samples


class GradientSamples:
    """Hooks that hand over each target's gradient samples during the backward pass, one target at a time.

    Inside the context call `start(samples)`, the model's forward, and backward on the summed loss; weights need no
    `requires_grad`: the graph begins at the first targets' outputs. A module that is called several times in one
    forward gives one gradient, the sum over its calls. Between `start(samples, last=False)` and the next start
    gradients are kept, to be handed over with those of the last microbatch of the step.

    Args:
        targets: whose gradients are wanted.
        sink: called with the target and its gradients.

    Attributes:
        seen: names of the targets that a forward pass has met.
    """

    def __init__(self, targets: Sequence[Target], sink: Callable[[Target, StepGradients], None]) -> None:
        self.targets, self.sink = targets, sink
        self.samples = 0
        self.seen: set[str] = set()
        self._microbatch, self._last = 0, True
        self._calls: dict[str, int] = {}
        # Of each target, by microbatch and call: its inputs, the gradients of its outputs, and the samples in these.
        self._kept: dict[str, dict[int, list[LayerGradients]]] = {}
        self._handles: list = []

    def start(self, samples: int, last: bool = True) -> None:
        """Begin the next microbatch of a step, of `samples` gradient samples; after the last begins another step."""
        if self._last:
            self._kept.clear()
        self._microbatch += 1
        self.samples, self._last = samples, last
        self._calls.clear()

    def __enter__(self) -> "GradientSamples":
        for target in self.targets:
            hook = self._forward_hook(target)
            self._handles += [module.register_forward_hook(hook) for module in target.modules]
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
            if output.dtype.itemsize < target.weight.dtype.itemsize:
                raise CAPError(
                    f"{target.name} computes in {output.dtype} with a weight in {target.weight.dtype}, too coarse for "
                    "gradients of single examples: take the autocast out of the model's own code"
                )
            self.seen.add(target.name)
            self._calls[target.name] = self._calls.get(target.name, 0) + 1
            if not output.requires_grad:
                # Nothing before this needs a gradient. A copy, because no one may write into a leaf.
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda grads: self._backward(target, module, inputs, grads))
            return output

        return hook

    def _backward(self, target: Target, module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor) -> None:
        calls = self._kept.setdefault(target.name, {}).setdefault(self._microbatch, [])
        calls.append(LayerGradients(target, module, inputs, grads.detach(), self.samples))
        self._calls[target.name] -= 1
        if not self._calls[target.name] and self._last:
            self.sink(target, StepGradients(list(self._kept.pop(target.name).values())))
