"""How many examples go through a model together, where all that a refit is asked for may be more than memory holds."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from cap_hf.collection.residuals import first_tensor
from cap_hf.collection.running import Batch, differentiable, frozen
from cap_hf.towers import see

# How many times the widest activation of an example takes memory, at the most, while it goes through both models: its
# two halves, as they come out of a layer, as they are between two, as moments are made of them, and put together.
AT_ONCE = 10
# Fewer than these tell of their own noise; so many are taken in any case.
LEAST = 32


def fitting(batches: list[tuple[Batch, int]], model: nn.Module, available: int) -> list[tuple[Batch, int]]:
    """Return so many of a process's examples, from the first on, as go through a model at once within memory, or LEAST.

    Args:
        batches: and where each begins among all processes' examples; not empty.
        model: whose activations are looked at, of one example.
        available: bytes.
    """
    widest = 0

    def look(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        nonlocal widest
        first = first_tensor(outputs)
        widest = max(widest, 0 if first is None else first.nbytes)

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(look).remove)
        with differentiable(model), frozen(model), torch.no_grad():
            see(model, {name: value[:1] for name, value in batches[0][0].items() if name != "labels"})
    most, kept, count = max(LEAST, available // max(1, AT_ONCE * widest)), [], 0
    for batch, start in batches:
        if count < most:
            kept.append(({name: value[: most - count] for name, value in batch.items()}, start))
            count += num_examples(kept[-1:])
    return kept


def least_bytes(widest: int) -> int:
    """Return the bytes that a refit takes at the least where the widest activation of an example has so many."""
    return LEAST * AT_ONCE * widest


def num_examples(batches: list[tuple[Batch, int]]) -> int:
    """Return how many examples some batches have."""
    return sum(len(batch["pixel_values"]) for batch, _ in batches)
