"""Measure whether a sparse layer is faster than a dense one here, once per process for layers that are alike."""

import copy
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from cap_hf.inference.linear import SparseWeightLinear
from cap_hf.inference.semi_structured import to_semi_structured

# The share of the dense layer's time that a sparse one must stay below: times vary, and in doubt nothing is changed.
MARGIN = 0.95
# A layer with a smaller share of zeros stays dense without being measured: no kernel was faster on any processor.
LEAST_SPARSITY = 0.2
# Layers of one shape are alike if their sparsity, rounded down to a multiple of this, is the same.
STEP = 0.05
# How a choice is measured: runs of each layer, and seconds after which fewer will do.
RUNS, SECONDS = 7, 0.3

# Makes a sparse layer of a Linear: the layer's class.
Kind = Callable[[nn.Linear], SparseWeightLinear]


def is_faster(kind: Kind, linear: nn.Linear, tokens: int) -> bool:
    """Return whether a sparse layer of this kind is faster than the Linear that it would replace.

    Args:
        kind: of the sparse layer.
        linear: on the CPU, in float32.
        tokens: rows of the input: the product of all its dimensions but the last.
    """
    weight = linear.weight
    sparsity = 1 - int(torch.count_nonzero(weight)) / weight.numel()
    if sparsity < LEAST_SPARSITY:
        return False
    # Rounded down, as a layer that is faster at a lower sparsity is faster at a higher one too.
    steps = int(sparsity / STEP + 1e-9)
    rows, cols = weight.shape
    return measured_faster(kind, rows, cols, tokens, steps, linear.bias is not None, torch.get_num_threads())


@functools.cache
def measured_faster(kind: Kind, rows: int, cols: int, tokens: int, steps: int, bias: bool, threads: int) -> bool:
    """Return `is_faster` for random weights of shape `(rows, cols)` and sparsity `steps * STEP`.

    `threads` is PyTorch's number of threads: another number is measured anew.
    """
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(cols, rows, bias=bias).requires_grad_(False)
    dense.weight.copy_(torch.randn(rows, cols, generator=generator))
    dense.weight.masked_fill_(torch.rand(rows, cols, generator=generator) < steps * STEP, 0.0)
    sparse = kind(dense)
    x = torch.randn(1, tokens, cols, generator=generator)
    with torch.inference_mode():
        dense_seconds, sparse_seconds = time_in_turns([lambda: dense(x), lambda: sparse(x)], RUNS, SECONDS)
    return statistics.median(sparse_seconds) < MARGIN * statistics.median(dense_seconds)


def is_semi_structured_faster(linear: nn.Linear, tokens: int) -> bool:
    """Return whether 2:4 is faster than dense for a Linear on a GPU that gets `tokens` rows of input."""
    sparse = copy.deepcopy(linear)
    to_semi_structured(sparse)
    x = torch.randn(1, tokens, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)

    def run(layer: nn.Linear) -> Callable[[], None]:
        def call() -> None:
            for _ in range(10):  # one product takes less time than its launch
                layer(x)
            torch.cuda.synchronize(x.device)

        return call

    with torch.inference_mode():
        dense_seconds, sparse_seconds = time_in_turns([run(linear), run(sparse)], RUNS, SECONDS)
    return statistics.median(sparse_seconds) < MARGIN * statistics.median(dense_seconds)


def time_in_turns(
    calls: list[Callable[[], object]], runs: int, seconds: float = float("inf"), pause: float = 0.0
) -> list[list[float]]:
    """Return the seconds of every run of every call; they take turns, so that what slows the machine slows all.

    Args:
        calls: each runs once beforehand, untimed.
        runs: turns that each call takes.
        seconds: end after this long, but not before three turns.
        pause: seconds to wait before each run.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    for turn in range(runs):
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
        for call, taken in zip(calls, times, strict=True):
            time.sleep(pause)
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times
