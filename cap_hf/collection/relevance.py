"""How much a refit minds the error of each position of a layer's output: as much as the model's loss does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from cap_hf.collection.objective import has_logits, make_loss, measure_deviations
from cap_hf.collection.running import Batch, backward
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.method.losses import FeatureLoss
from cap_hf.targets import Target

# Examples that go through the model together.
MICROBATCH = 16
# The share of a position's weight that its gradient says; the rest is the same for all. With all of it positions that
# the loss does not see would be free to become anything, and the loss sees little from one example.
SAID = 0.9
# A position counts at most so many times as much as the mean of its example: a few would else be all there is.
MOST = 20.0


def position_weights(
    model: nn.Module, targets: Sequence[Target], inputs: Batch, config: CAPConfig, processes: Processes
) -> dict[str, torch.Tensor]:
    """Return for each target's name the weights of its output's positions, of mean about 1 in each example.

    They grow with `|dL/dy|^2`, the squared gradient of the loss with respect to what a position puts out: the diagonal
    of the output's side of a Kronecker-factored Fisher (K-FAC, arXiv 1503.05671, section 3), kept apart by position.
    The loss needs no labels: cross entropy with labels drawn from the model, or the error of its features.

    Args:
        model: dense, within `frozen`.
        targets: of the model, each with one module that is called once.
        inputs: of `b` examples of this process.
        config: for the seed, and for the weights of the features.
        processes: of the run.

    Returns:
        Of a Linear `(b', ...)`, its output without the channels, of a Conv2d `(b', h, w)`, in float32.
    """
    wish = "sampled" if has_logits(model, inputs) else "features"
    loss = make_loss(replace(config, fisher_loss=wish), model)
    if isinstance(loss, FeatureLoss):
        measure_deviations(loss, model, split(inputs), processes, disable_tqdm=True)
    count = len(next(iter(inputs.values())))
    draws = loss.draws(count, (config.seed + processes.rank) % 2**32)
    found: dict[str, list[torch.Tensor]] = {target.name: [] for target in targets}
    start = 0
    with ExitStack() as stack:
        for target in targets:
            stack.callback(target.module.register_forward_hook(squares_into(found[target.name], target)).remove)
        for batch in split(inputs):
            stop = start + len(next(iter(batch.values())))
            backward(model, batch, loss, None if draws is None else draws[start:stop])
            start = stop
    return {name: weights_of(torch.cat(parts), count) for name, parts in found.items()}


def squares_into(found: list[torch.Tensor], target: Target) -> Callable:
    """Return a forward hook of a target's module; the backward pass then adds its output's squared gradients."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
        if not outputs.requires_grad:
            # Nothing before this needs a gradient. A copy, because no one may write into a leaf.
            outputs = outputs.detach().requires_grad_().clone()
        channels = 1 if target.is_conv else -1
        # 0 where the loss does not depend on it: then no gradient comes.
        squares = outputs.new_zeros(outputs.select(channels, 0).shape, dtype=torch.float32)
        found.append(squares)
        outputs.register_hook(lambda grads: note(squares, grads, channels))
        return outputs

    return hook


def note(squares: torch.Tensor, grads: torch.Tensor, channels: int) -> None:
    """Keep the squared gradients of positions, summed over their channels."""
    squares.copy_(grads.float().square().sum(channels))


def weights_of(squares: torch.Tensor, examples: int) -> torch.Tensor:
    """Return weights in the shape of squared gradients, for so many examples, whose positions lie side by side."""
    by_example = squares.reshape(examples, -1)
    # Gradients of an example that the model is sure of can be smaller than float32 tells from 0 once squared.
    by_example = by_example / by_example.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    mean = by_example.mean(1, keepdim=True)
    relative = torch.where(mean > 0, by_example / mean, 1.0).clamp_max(MOST)
    return (1 - SAID + SAID * relative).view_as(squares)


def split(inputs: Batch) -> Iterator[Batch]:
    """Yield examples, so many at a time as go through the model together."""
    parts = {name: value.split(MICROBATCH) for name, value in inputs.items()}
    for each in zip(*parts.values(), strict=True):
        yield dict(zip(parts, each, strict=True))
