"""Measure which layer is the fastest here, sparse or dense, once per process for layers that are alike."""

import copy
import functools
import math
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from cap_hf.checkpoints.int8 import is_pruned
from cap_hf.inference.int8_linear import DenseInt8Linear, SparseInt8Linear, has_dense_int8
from cap_hf.inference.int8_packing import WORD
from cap_hf.inference.linear import SparseLinear, SparseWeightLinear, stored_weight
from cap_hf.inference.operators import has_kernel
from cap_hf.inference.semi_structured import to_semi_structured

# The share of the dense layer's time that a sparse one must stay below: times vary, and in doubt nothing is changed.
MARGIN = 0.95
# Layers of one shape are alike if their sparsity, rounded down to a multiple of this, is the same.
STEP = 0.05
# A float32 layer with fewer zeros stays dense without being measured: no kernel was faster on any processor.
LEAST_SPARSITY = 0.2
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
    dense = random_linear(rows, cols, steps, 0, bias)
    dense_seconds, sparse_seconds = measure([dense, kind(dense)], tokens, cols)
    return sparse_seconds < MARGIN * dense_seconds


def random_linear(rows: int, cols: int, steps: int, word_steps: int, bias: bool) -> nn.Linear:
    """Return a Linear with random weights `(rows, cols)` and zeros at random, for measuring.

    Args:
        rows, cols: its shape.
        steps: the sparsity, in multiples of `STEP`.
        word_steps: of the words (four consecutive weights of a row) that are all zeros, at most `steps`.
        bias: whether it has one.
    """
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(cols, rows, bias=bias).requires_grad_(False)
    linear.weight.copy_(torch.randn(rows, cols, generator=generator))
    in_words = word_steps * STEP
    # Zeros in the other words, so that there are as many as there should be.
    elsewhere = 1 - (1 - steps * STEP) / (1 - in_words) if in_words < 1 else 1.0
    linear.weight.masked_fill_(torch.rand(rows, cols, generator=generator) < elsewhere, 0.0)
    words = torch.rand(rows, math.ceil(cols / WORD), generator=generator) < in_words
    linear.weight.masked_fill_(words.repeat_interleave(WORD, dim=1)[:, :cols], 0.0)
    return linear


def measure(layers: list[nn.Module], tokens: int, in_features: int) -> list[float]:
    """Return the seconds of Linear layers of one shape, with an input of so many tokens; they take turns.

    The least of all runs: other work on the machine only adds to them, and more to a layer that uses more threads.
    """
    x = torch.randn(1, tokens, in_features, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        times = time_in_turns([functools.partial(layer, x) for layer in layers], RUNS, SECONDS)
    return [min(each) for each in times]


def fastest_kind(linear: nn.Linear, tokens: int) -> Kind | None:
    """Return the fastest of all layers for a Linear that may become int8; None if that is the Linear itself.

    Sparse float32 must be faster than dense by `MARGIN`, and int8, which changes results, faster than both by it.

    Args:
        linear: on the CPU, in float32, with weights that `is_quantizable`, or int8 ones.
        tokens: rows of the input.
    """
    weight = stored_weight(linear)
    rows, cols = weight.shape
    zeros = functional.pad(weight == 0, (0, -cols % WORD), value=True)
    sparsity = 1 - int(torch.count_nonzero(weight)) / weight.numel()
    if not is_pruned(weight):
        return None
    empty_words = float(zeros.view(rows, -1, WORD).all(dim=2).float().mean())
    steps, word_steps = (int(share / STEP + 1e-9) for share in (sparsity, min(sparsity, empty_words)))
    return measured_kind(rows, cols, tokens, steps, word_steps, linear.bias is not None, torch.get_num_threads())


@functools.cache
def measured_kind(
    rows: int, cols: int, tokens: int, steps: int, word_steps: int, bias: bool, threads: int
) -> Kind | None:
    """Return `fastest_kind` for random weights, as of `random_linear`; another number of threads is measured anew."""
    dense = random_linear(rows, cols, steps, word_steps, bias)
    exact: list[Kind | None] = [None, *([SparseLinear] if has_kernel() and steps * STEP >= LEAST_SPARSITY else [])]
    quantized: list[Kind] = [SparseInt8Linear, *([DenseInt8Linear] if has_dense_int8() else [])]
    kinds = exact + quantized
    seconds = dict(zip(kinds, measure([kind(dense) if kind else dense for kind in kinds], tokens, cols), strict=True))
    fastest_exact, fastest_int8 = (min(each, key=lambda kind: seconds[kind]) for each in (exact, quantized))
    if seconds[fastest_int8] < MARGIN * seconds[fastest_exact]:
        return fastest_int8
    return fastest_exact if seconds[fastest_exact] < MARGIN * seconds[None] else None


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
    return min(sparse_seconds) < MARGIN * min(dense_seconds)


def time_in_turns(
    calls: list[Callable[[], object]],
    runs: int,
    seconds: float = float("inf"),
    pause: float = 0.0,
    warm: bool = False,
) -> list[list[float]]:
    """Return the seconds of every run of every call; they take turns, so that what slows the machine slows all.

    Args:
        calls: each runs once beforehand, untimed.
        runs: turns that each call takes.
        seconds: end after this long, but not before three turns.
        pause: seconds to wait before each turn.
        warm: whether each turn begins with an untimed run: what ran since has put other things into the caches.
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
            if warm:
                call()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return times
