"""Stretches of a model that can be gone through alone: layers of which each hands what it makes to the next one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from cap_hf.targets import Target


@dataclass(frozen=True)
class Call:
    """What a layer is called with.

    Attributes:
        hidden: the hidden states, `(b, ...)`.
        args: its positional arguments, without the hidden states where they are the first one.
        kwargs: the others, without the hidden states where they have a name.
        name: that the hidden states have; None where they are the first positional argument.
    """

    hidden: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Call | None":
        """Return a call; None where its first argument is no tensor."""
        if args:
            return cls(args[0], args[1:], kwargs) if isinstance(args[0], torch.Tensor) else None
        name = next(iter(kwargs), None)
        if name is None or not isinstance(kwargs[name], torch.Tensor):
            return None
        return cls(kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}, name)

    def with_hidden(self, hidden: torch.Tensor) -> "Call":
        """Return the call with other hidden states."""
        return replace(self, hidden=hidden)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return all positional arguments, and all others."""
        if self.name is None:
            return (self.hidden, *self.args), dict(self.kwargs)
        return self.args, {self.name: self.hidden, **self.kwargs}

    def on(self, layer: nn.Module) -> torch.Tensor:
        """Return the hidden states that a layer makes when it is called so."""
        args, kwargs = self.arguments
        return first_tensor(layer(*args, **kwargs))

    @property
    def is_light(self) -> bool:
        """Return whether the tensors beside the hidden states need no gradient and together are no larger."""
        others = self.others
        light = sum(each.numel() for each in others) <= self.hidden.numel()
        return light and not any(each.requires_grad for each in others)

    @property
    def others(self) -> list[torch.Tensor]:
        """Return all tensors beside the hidden states."""
        return tensors_in((self.args, self.kwargs))


@dataclass(frozen=True)
class Chain:
    """Layers of a model in the order of their calls; what one makes goes to the next and to nothing else.

    Attributes:
        layers: of the model.
        targets: names of those in each layer.
        sizes: bytes of one gradient sample's hidden states before each layer, and after the last.
        beside: bytes of all other tensors that the layers are called with, such as masks, of one gradient sample.
    """

    layers: tuple[nn.Module, ...]
    targets: tuple[frozenset[str], ...]
    sizes: tuple[int, ...]
    beside: int = 0


@dataclass(frozen=True)
class Stretch:
    """Some layers of a chain, one after the other: those that a group of targets lies in.

    Attributes:
        chain: that they are of.
        start: number of the first.
        stop: number behind the last.
    """

    chain: Chain
    start: int
    stop: int

    def forward(self, calls: Mapping[int, Call]) -> torch.Tensor:
        """Return the hidden states behind the last layer, of the calls of each, by its number in the chain."""
        hidden = calls[self.start].hidden
        for number in range(self.start, self.stop):
            hidden = calls[number].with_hidden(hidden).on(self.chain.layers[number])
        return hidden

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Return the layers."""
        return self.chain.layers[self.start : self.stop]


def stretch_of(chains: Iterable[Chain], targets: Sequence[Target], stride: int = 1) -> Stretch | None:
    """Return the shortest stretch that all of some targets lie in; None where there is none.

    Args:
        chains: of the model.
        targets: of one pass.
        stride: stretches begin and end at every so many layers alone; 1 for at any.
    """
    names = {target.name for target in targets}
    for chain in chains:
        where = [number for number, inside in enumerate(chain.targets) if inside & names]
        if where and names <= frozenset().union(*chain.targets):
            stop = -(-(where[-1] + 1) // stride) * stride
            return Stretch(chain, where[0] // stride * stride, min(stop, len(chain.layers)))
    return None


def kept_bytes(stretches: Iterable[Stretch | None]) -> int:
    """Return the bytes that one gradient sample takes before and behind some stretches, each place counted once."""
    before: set[tuple[int, int]] = set()
    behind: set[tuple[int, int]] = set()
    sizes: dict[tuple[int, int], int] = {}
    beside: dict[int, int] = {}
    for each in stretches:
        if each is not None:
            beside[id(each.chain)] = each.chain.beside
            first, last = (id(each.chain), each.start), (id(each.chain), each.stop)
            before.add(first)
            behind.add(last)
            sizes |= {first: each.chain.sizes[each.start], last: each.chain.sizes[each.stop]}
    return sum(sizes[place] for place in [*before, *behind]) + sum(beside.values())


def first_tensor(output: Any) -> Any:
    """Return what a layer makes, the first of several things."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def tensors_in(nested: Any) -> list[torch.Tensor]:
    """Return all tensors in nested tuples, lists and dicts."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    if isinstance(nested, Mapping):
        nested = list(nested.values())
    return [found for each in nested for found in tensors_in(each)] if isinstance(nested, (tuple, list)) else []
