"""Gradient samples through hooks, and the block Fisher summed from them."""

import logging
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from cap_hf.errors import CAPError
from cap_hf.targets import Target, summarize

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


def unfold_conv(module: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    """The input patches of a convolution: `(b, channels, h, w)` -> `(b, groups, patch, positions)`."""
    # The convolution's own padding in F.pad's order; it covers 'same' and every padding mode.
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    inputs = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(inputs, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return patches.unflatten(1, (module.groups, -1))


def sample_gradients(
    module: nn.Module, inputs: torch.Tensor, grads: torch.Tensor, samples: int, buffer: torch.Tensor | None = None
) -> torch.Tensor:
    """Gradients of the weight, one for each of `samples` equal groups of consecutive examples.

    Args:
        module: a Linear or a Conv2d.
        inputs: what it was called with; Linear `(b, ..., in)`, Conv2d `(b, in, h, w)`. b is a multiple of
            `samples`: windows or groups of one example lie side by side in it.
        grads: gradient of the summed loss with respect to its output.
        samples: how many gradient samples there are.
        buffer: 1-d float32 memory of at least `samples * weight.numel()` entries that a Linear's result may take.

    Returns:
        `(samples, *weight.shape)`, the sum over each group, in float32 (float64 stays).
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    inputs, grads = inputs.to(dtype), grads.to(dtype)
    if isinstance(module, nn.Linear):
        inputs = inputs.reshape(samples, -1, inputs.shape[-1])
        grads = grads.reshape(samples, -1, grads.shape[-1])
        out = None
        if buffer is not None and buffer.dtype == dtype:
            out = buffer[: samples * module.weight.numel()].view(samples, *module.weight.shape)
        return torch.bmm(grads.mT, inputs, out=out)
    patches = unfold_conv(module, inputs)
    grads = grads.flatten(2).unflatten(1, (module.groups, -1))
    patches, grads = (tensor.unflatten(0, (samples, -1)) for tensor in (patches, grads))
    return torch.einsum("sbgol,sbgil->sgoi", grads, patches).reshape(samples, *module.weight.shape)


class GradientSamples:
    """Hooks that hand over each target's gradient samples during the backward pass, one target at a time.

    Inside the context call `start(samples)`, the model's forward, and backward on the summed loss. A module that
    is called several times in one forward gives one gradient, the sum over its calls.

    Args:
        targets: whose gradients are wanted.
        sink: called with the target and its `(samples, num_blocks, block_size)` gradients.
    """

    def __init__(self, targets: Sequence[Target], sink: Callable[[Target, torch.Tensor], None]) -> None:
        self.targets, self.sink = targets, sink
        self.samples = 0
        self.seen: set[str] = set()
        self._calls: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._handles: list = []
        self._buffer: torch.Tensor | None = None

    def start(self, samples: int) -> None:
        """Forget the previous batch; the next one holds `samples` gradient samples."""
        self.samples = samples
        self._calls.clear()
        self._sums.clear()
        # One memory for all targets in turn: touching fresh memory costs several times the product itself.
        size = samples * max(target.weight.numel() for target in self.targets)
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.float32, device=self.targets[0].weight.device)

    def __enter__(self) -> "GradientSamples":
        for target in self.targets:
            self._handles.append(target.module.register_forward_hook(self._forward_hook(target)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._sums.clear()
        self._buffer = None

    def _forward_hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs = args[0].detach()
            if len(inputs) % self.samples:
                raise CAPError(
                    f"{target.name} mixes examples (its input has {len(inputs)} rows for {self.samples} gradient "
                    f"samples): leave it out with --exclude '{target.name}'"
                )
            self.seen.add(target.name)
            self._calls[target.name] = self._calls.get(target.name, 0) + 1
            output.register_hook(lambda grads: self._backward(target, inputs, grads))

        return hook

    def _backward(self, target: Target, inputs: torch.Tensor, grads: torch.Tensor) -> None:
        gradient = sample_gradients(target.module, inputs, grads.detach(), self.samples, self._buffer)
        if target.name in self._sums:
            gradient = gradient.add_(self._sums.pop(target.name))
        self._calls[target.name] -= 1
        if self._calls[target.name]:
            self._sums[target.name] = gradient.clone()
        else:
            self.sink(target, target.to_blocks(gradient))


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


class BlockFisher:
    """`F_b = (1/N) sum g_b g_b^T` for every block of every target (arXiv 2210.09223, eq. of the empirical Fisher).

    Attributes:
        sums: for each target's name `(num_blocks, B, B)`: sums of outer products.
        count: how many gradient samples they hold.
    """

    def __init__(
        self, targets: Sequence[Target], num_blocks: Callable[[Target], int] = lambda target: target.num_blocks
    ) -> None:
        self.targets = list(targets)
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0
        for target in self.targets:
            dtype = torch.promote_types(target.weight.dtype, torch.float32)
            shape = (num_blocks(target), target.block_size, target.block_size)
            self.sums[target.name] = torch.zeros(shape, dtype=dtype, device=target.weight.device)

    def add(self, target: Target, gradients: torch.Tensor) -> None:
        """Add `(samples, num_blocks, B)` gradients by one batched matrix product, without a copy of them."""
        sums = self.sums[target.name]
        sums.baddbmm_(gradients.permute(1, 2, 0), gradients.permute(1, 0, 2))

    def collect(self, model: nn.Module, batches: Iterable[tuple[Batch, int, torch.Tensor | None]]) -> None:
        """Run the model forward and backward over batches and add up.

        Args:
            model: in eval mode; its parameters need no `requires_grad`, and their `.grad` is not touched.
            batches: (batch with `labels`, number of gradient samples, uniforms for sampled labels or None).

        Raises:
            CAPError: a loss or a gradient is not finite (names the layer), or a layer mixes examples.
        """
        # Gradients of activations alone are needed: weights are frozen, and the pixels start the graph.
        required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        try:
            with GradientSamples(self.targets, self.add) as hooks, torch.enable_grad():
                for batch, samples, uniforms in batches:
                    hooks.start(samples)
                    inputs = {name: value for name, value in batch.items() if name != "labels"}
                    inputs["pixel_values"] = inputs["pixel_values"].detach().requires_grad_()
                    logits = model(**inputs).logits
                    labels = labels_for(logits, batch["labels"], uniforms)
                    loss = F.cross_entropy(logits.float(), labels, reduction="sum") * (samples / len(labels))
                    loss.backward()
                    self.count += samples
                    if not loss.isfinite():
                        self.check_finite()
                        raise CAPError("the loss is NaN or infinite: check the model's head and the pixel values")
        finally:
            for parameter, requires_grad in required.items():
                parameter.requires_grad_(requires_grad)
        self.check_finite()
        unseen = [target.name for target in self.targets if self.count and target.name not in hooks.seen]
        if unseen:
            raise CAPError(
                f"{summarize(unseen, 3)} take no part in the model's forward pass: leave them out with --exclude"
            )

    def check_finite(self) -> None:
        """Raise a CAPError that names the first layers whose sums are not finite."""
        broken = [name for name, sums in self.sums.items() if not sums.diagonal(dim1=-2, dim2=-1).sum().isfinite()]
        if broken:
            raise CAPError(
                f"gradients are NaN or infinite in {summarize(broken, 3)}: check the model's weights and its dtype "
                "(load it in float32) and the pixel values"
            )

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums and counts of all processes, in place, on every process."""
        if accelerator.num_processes == 1:
            return
        for name, sums in self.sums.items():
            self.sums[name] = accelerator.reduce(sums, reduction="sum")
        count = torch.tensor(self.count, device=accelerator.device)
        self.count = int(accelerator.reduce(count, reduction="sum"))

    def damps(self, damp: float, absolute: bool) -> dict[str, float]:
        """What is added to the diagonal of each target's F: `damp`, relative to the target's mean diagonal or not.

        Names blocks without any gradient in a warning. A target without any takes the mean damp of the others.

        Raises:
            CAPError: no target has a gradient.
        """
        means = {}
        for name, sums in self.sums.items():
            diagonals = sums.diagonal(dim1=-2, dim2=-1).double()
            means[name] = float(diagonals.mean()) / self.count
            dead = int((diagonals.sum(dim=1) == 0).sum())
            if dead:
                logger.warning(
                    "%s: %d of %d blocks have no gradient at all; their weights are removed first.",
                    name,
                    dead,
                    len(diagonals),
                )
        alive = [mean for mean in means.values() if mean > 0]
        if not alive:
            raise CAPError("all gradients are 0: the loss does not depend on any target")
        fallback = sum(alive) / len(alive)
        return {name: damp if absolute else damp * (mean or fallback) for name, mean in means.items()}

    def damped(self, target: Target, blocks: slice | torch.Tensor, damp: float) -> torch.Tensor:
        """`F + damp I` of some of a target's blocks, `(n, B, B)`, a new tensor in float64."""
        sums = self.sums[target.name]
        index = torch.arange(target.num_blocks, device=sums.device)[blocks]
        if len(sums) != target.num_blocks:
            # Shared by the rows of a group (sparsegpt).
            index = index * len(sums) // target.num_blocks
        single = len(index) > 1 and bool((index == index[0]).all())
        fisher = sums[index[:1] if single else index].double() / self.count
        fisher.diagonal(dim1=-2, dim2=-1).add_(damp)
        return fisher.expand(len(index), -1, -1)
