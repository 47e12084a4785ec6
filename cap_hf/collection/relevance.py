"""How much a refit minds the error of each position of a layer's output: as much as the model's loss does."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch
from torch import nn

from cap_hf.collection.layers import channel_dim, check_unmixed
from cap_hf.collection.objective import has_logits, make_loss, measure_deviations
from cap_hf.collection.running import Batch, backward
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.method.losses import FeatureLoss, FisherLoss
from cap_hf.targets import Target
from cap_hf.towers import tower_of

# Examples that go through the model together: their graph is in memory at once.
MICROBATCH = 4
# The share of a position's weight that its gradient says; the rest is the same for all. With all of it positions that
# the loss does not see would be free to become anything, and the loss sees little from one example.
SAID = 0.9
# A position counts at most so many times as much as the mean of its example: a few would else be all there is.
MOST = 20.0
# Settings of a config that say what goes, which positions' weights do not depend on.
ALLOCATING = ("allocation", "selection")


class Relevance:
    """The position weights of one dense model: made once for the same examples, however often they are asked for."""

    def __init__(self) -> None:
        self._known, self._weights = "", dict[str, torch.Tensor]()

    def position_weights(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        inputs: Batch,
        places: torch.Tensor,
        config: CAPConfig,
        processes: Processes,
    ) -> dict[str, torch.Tensor]:
        """Return what `position_weights` does, in the dtype that sums over the positions have.

        It is made anew where anything that it depends on has changed since it was asked for last, but for the targets'
        own weights and biases: these are always those of the same dense model.
        """
        known = fingerprint(model, targets, inputs, places, config)
        # All processes make it together, or none.
        if not all(same for (same,) in processes.gather_ints(int(known == self._known))):
            dtype = torch.promote_types(inputs["pixel_values"].dtype, torch.float32)
            # What was known takes no memory while there is something new.
            self._known, self._weights = "", {}
            found = position_weights(model, targets, inputs, places, config, processes)
            self._known, self._weights = known, {name: each.to(dtype) for name, each in found.items()}
        return self._weights


def fingerprint(
    model: nn.Module, targets: Sequence[Target], inputs: Batch, places: torch.Tensor, config: CAPConfig
) -> str:
    """Return what tells apart all that position weights depend on, but for the targets' own weights and biases."""
    own = {id(tensor) for target in targets for tensor in (target.weight, target.module.bias)}
    tower = tower_of(model)
    rest = [(name, each) for name, each in tower.named_parameters() if id(each) not in own]
    settings = {name: value for name, value in asdict(config).items() if name not in ALLOCATING}
    digest = hashlib.sha256(repr((sorted(settings.items()), [target.name for target in targets])).encode())
    for name, tensor in [*sorted(inputs.items()), ("places", places), *rest, *tower.named_buffers()]:
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def position_weights(
    model: nn.Module,
    targets: Sequence[Target],
    inputs: Batch,
    places: torch.Tensor,
    config: CAPConfig,
    processes: Processes,
) -> dict[str, torch.Tensor]:
    """Return for each target's name the weights of its output's positions, of mean about 1 in each example.

    They grow with `|dL/dy|^2`, the squared gradient of the loss with respect to what a position puts out: the diagonal
    of the output's side of a Kronecker-factored Fisher (K-FAC, arXiv 1503.05671, section 3), kept apart by position.
    The loss needs no labels, see `label_free_loss`.

    Args:
        model: dense, within `frozen`.
        targets: of the model, each with one module that is called once.
        inputs: of `b` examples of this process, without labels.
        places: `(b,)` of whole numbers, where each of them stands among all processes' examples: so it has the same
            loss in whatever process it is.
        config: for the seed, and for the loss.
        processes: of the run.

    Returns:
        `(b, positions)` in float64, the positions in the order in which they lie in the output. An example whose loss
        has no gradient at an output has 1 at all positions of it, one whose gradient is not finite NaN.

    Raises:
        CAPError: a layer mixes examples, or the model returns no features that count, or such that are not finite.
    """
    loss = label_free_loss(model, inputs, config, processes)
    number = 1 + max(last for (last,) in processes.gather_ints(int(places.max())))
    draws = loss.draws(number, config.seed)
    assert draws is not None  # of a loss without labels
    found: dict[str, list[torch.Tensor]] = {target.name: [] for target in targets}
    squares: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for target in targets:
            stack.callback(target.module.register_forward_hook(squares_into(squares, target.name)).remove)
        for batch, drawn in zip(split(inputs), draws[places].split(MICROBATCH), strict=True):
            backward(model, batch, loss, drawn)
            for target in targets:
                own = squares.pop(target.name)
                check_unmixed(target, len(own), len(drawn))
                found[target.name].append(own.reshape(len(drawn), -1))
    return {name: weights_of(torch.cat(parts)) for name, parts in found.items()}


def label_free_loss(model: nn.Module, inputs: Batch, config: CAPConfig, processes: Processes) -> FisherLoss:
    """Return the Fisher's loss where that needs no labels, or else the one that comes nearest to it.

    That is the error of the features where the config asks for it, or the model tells no classes apart; in all other
    cases cross entropy with labels drawn from the model.
    """
    features = config.fisher_loss == "features" or not has_logits(model, inputs)
    loss = make_loss(replace(config, fisher_loss="features" if features else "sampled"), model)
    if isinstance(loss, FeatureLoss):
        measure_deviations(loss, model, split(inputs), processes, disable_tqdm=True)
    return loss


def squares_into(squares: dict[str, torch.Tensor], name: str) -> Callable:
    """Return a forward hook of a layer; the backward pass then gives its name the squared gradients of its output.

    They are summed over channels, in float64: of an example that a model is sure of, float32 could not tell them from
    0.
    """

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
        if not outputs.requires_grad:
            # Nothing before this needs a gradient. A copy, because no one may write into a leaf.
            outputs = outputs.detach().requires_grad_().clone()
        channels = channel_dim(module)
        # Where the loss does not depend on it no gradient comes.
        squares[name] = outputs.new_zeros(outputs.select(channels, 0).shape, dtype=torch.float64)

        def keep(grads: torch.Tensor) -> None:
            squares[name] = grads.double().square().sum(channels)

        outputs.register_hook(keep)
        return outputs

    return hook


def weights_of(squares: torch.Tensor) -> torch.Tensor:
    """Return the weights that squared gradients, both `(b, positions)`, give to the positions of each example."""
    mean = squares.mean(1, keepdim=True)
    relative = torch.where(mean == 0, 1.0, squares / mean).clamp_max(MOST)
    return 1 - SAID + SAID * relative


def split(inputs: Batch) -> Iterator[Batch]:
    """Yield examples, so many at a time as go through the model together."""
    parts = {name: value.split(MICROBATCH) for name, value in inputs.items()}
    for each in zip(*parts.values(), strict=True):
        yield dict(zip(parts, each, strict=True))
