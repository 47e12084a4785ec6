"""Finds the layers of a model that can be gone through alone: it tries them on a few examples."""

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from cap_hf.collection.running import Batch, backward
from cap_hf.collection.stretches import Call, Chain, Stretch, first_tensor
from cap_hf.distributed.processes import Processes
from cap_hf.method.losses import FisherLoss
from cap_hf.targets import Target

# Targets that a layer of a chain has at least: a list of single convolutions is a part of a layer.
LEAST_TARGETS = 2


def find_chains(
    model: nn.Module,
    batch: Batch,
    loss: FisherLoss,
    draws: torch.Tensor | None,
    targets: Sequence[Target],
    samples: int,
) -> list[Chain]:
    """Return the chains of a model whose layers, called alone, do what they do in the model, bit for bit.

    What a layer makes may be used elsewhere too, such as in a head of many scales, or a layer may go by what the model
    has set before. Both show: gone through alone a chain then makes other hidden states or other gradients.

    Args:
        model: within `frozen`.
        batch: a few examples.
        loss: whose gradients are wanted.
        draws: what is random in it.
        targets: that the layers hold.
        samples: gradient samples in the batch.
    """
    layers = candidates(model, targets)
    watch = Watch(layers)
    with watch.watching():
        backward(model, batch, loss, draws)
    chains = []
    for run in watch.runs():
        inside = tuple(names_inside(layers[number], targets) for number in run)
        states = [watch.calls[number].hidden for number in run] + [watch.made[run[-1]]]
        sizes = tuple(state.nbytes // samples for state in states)
        calls = {place: watch.calls[number] for place, number in enumerate(run)}
        beside = {each.data_ptr(): each.nbytes for call in calls.values() for each in call.others}
        chain = Chain(tuple(layers[number] for number in run), inside, sizes, sum(beside.values()) // samples)
        if any(inside) and does_the_same(chain, calls, watch.grads[run[0]], watch.made[run[-1]], watch.after[run[-1]]):
            chains.append(chain)
    return chains


def does_the_same(
    chain: Chain, calls: Mapping[int, Call], before: torch.Tensor, made: torch.Tensor, after: torch.Tensor
) -> bool:
    """Return whether a chain, gone through alone, makes the same hidden states and the same gradients.

    Args:
        chain: whose layers are called.
        calls: of each of them in the model.
        before: gradient of the loss with respect to the first one's hidden states, in the model.
        made: by the last one, in the model.
        after: gradient of the loss with respect to that.
    """
    first = calls[0].hidden.detach().requires_grad_()
    try:
        with torch.enable_grad():
            # A copy: no one may write into a leaf.
            own = dict(calls) | {0: calls[0].with_hidden(first.clone())}
            found = Stretch(chain, 0, len(chain.layers)).forward(own)
        if not found.requires_grad or not torch.equal(found, made):
            return False
        (grads,) = torch.autograd.grad(found, first, after)
    except Exception:
        # In the model they have worked a moment ago: alone they miss something of it, and are no chain.
        return False
    return torch.equal(grads, before)


class Watch:
    """What layers are called with and make in one pass through a model, and the gradients of both.

    Args:
        layers: that are watched.

    Attributes:
        calls: of each layer, by its number; of those alone that are called lightly, and write into no input.
        made: the hidden states that each makes.
        grads: gradients of the loss with respect to the hidden states that each is called with.
        after: with respect to those that it makes.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.calls: dict[int, Call] = {}
        self.made: dict[int, torch.Tensor] = {}
        self.grads: dict[int, torch.Tensor] = {}
        self.after: dict[int, torch.Tensor] = {}
        self._order: list[int] = []
        self._given: dict[int, torch.Tensor] = {}
        self._versions: dict[int, int] = {}
        self._handed: dict[int, torch.Tensor] = {}

    def watching(self) -> ExitStack:
        """Return a context with hooks on the layers."""
        stack = ExitStack()
        for number, layer in enumerate(self.layers):
            stack.callback(layer.register_forward_pre_hook(self._before(number), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(self._behind(number)).remove)
        return stack

    def _before(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._order.append(number)
            call = Call.of(args, kwargs)
            if call is None or not call.hidden.is_floating_point():
                return None
            # A tensor of its own, and not the one before: that has the gradients of all who use it.
            if not call.hidden.requires_grad:
                # A copy: no one may write into a leaf.
                call = call.with_hidden(call.hidden.detach().requires_grad_().clone())
            self._given[number], self._versions[number] = call.hidden, call.hidden._version
            call.hidden.register_hook(lambda grads: self.grads.__setitem__(number, grads.detach()))
            if call.is_light:
                self.calls[number] = call.with_hidden(call.hidden.detach().clone())
            return call.arguments

        return hook

    def _behind(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = self._given.get(number)
            if given is not None and given._version != self._versions[number]:
                # What it was called with is gone: kept as it is, that would be something else.
                self.calls.pop(number, None)
            made = first_tensor(output)
            if made is not None and made.requires_grad:
                self._handed[number] = made
                self.made[number] = made.detach()
                made.register_hook(lambda grads: self.after.__setitem__(number, grads.detach()))

        return hook

    def runs(self) -> list[list[int]]:
        """Return the numbers of the layers in runs: each is handed the very tensor that the one before has made."""
        found: list[list[int]] = []
        for number in self._order:
            known = all(number in each for each in (self.calls, self.made, self.grads, self.after))
            if not known or self._order.count(number) > 1:
                found.append([])
            elif found and found[-1] and self._given[number] is self._handed[found[-1][-1]]:
                found[-1].append(number)
            else:
                found.append([number])
        return [run for run in found if run]


def candidates(model: nn.Module, targets: Sequence[Target]) -> list[nn.Module]:
    """Return the members of a model's innermost lists of layers, of which each that has targets has several."""
    lists = [each for each in model.modules() if isinstance(each, (nn.ModuleList, nn.Sequential))]
    counts = [[len(names_inside(layer, targets)) for layer in each] for each in lists]
    lists = [
        each
        for each, numbers in zip(lists, counts, strict=True)
        if any(numbers) and min(filter(None, numbers)) >= LEAST_TARGETS
    ]
    inner = [each for each in lists if not any(other is not each and other in set(each.modules()) for other in lists)]
    return [layer for each in inner for layer in each]


def names_inside(layer: nn.Module, targets: Sequence[Target]) -> frozenset[str]:
    """Return the names of the targets in a layer."""
    inside = set(layer.modules())
    return frozenset(target.name for target in targets if inside.issuperset(target.modules))


def agreed(chains: list[Chain], processes: Processes) -> list[Chain]:
    """Return chains that all processes have found alike, or none: all of them go by the same plan."""
    found = [(sorted(map(sorted, chain.targets)), chain.sizes, chain.beside) for chain in chains]
    marks = processes.gather_ints(zlib.crc32(repr(found).encode()))
    return chains if all(mark == marks[0] for mark in marks) else []
