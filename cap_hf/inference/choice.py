"""Is a sparse layer faster than a dense one here? Measured, once a process for layers that are alike."""

import copy
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from cap_hf.inference.linear import SparseWeightLinear
from cap_hf.inference.semi_structured import to_semi_structured

# A sparse layer must win by this much: what is measured has a spread, and in doubt nothing is changed.
MARGIN = 0.95
# Below this no kernel wins on any processor measured, and there is nothing to measure.
LEAST_SPARSITY = 0.2
# Layers whose sparsity differs by less are taken to be alike.
STEP = 0.05
RUNS, SECONDS = 7, 0.3


def is_faster(kind: type[SparseWeightLinear], linear: nn.Linear, tokens: int) -> bool:
    """Whether a sparse layer of this kind beats the Linear it would replace.

    Args:
        tokens: rows of the input, over all its leading dimensions.
    """
    weight = linear.weight
    sparsity = 1 - int(torch.count_nonzero(weight)) / weight.numel()
    if sparsity < LEAST_SPARSITY:
        return False
    # Rounded down: what wins with a few more weights wins with fewer.
    steps = int(sparsity / STEP + 1e-9)
    rows, cols = weight.shape
    return measured_faster(kind, rows, cols, tokens, steps, linear.bias is not None, torch.get_num_threads())


@functools.cache
def measured_faster(
    kind: type[SparseWeightLinear], rows: int, cols: int, tokens: int, steps: int, bias: bool, threads: int
) -> bool:
    """`is_faster` for random weights of this shape and `steps * STEP` sparsity; `threads` only tells runs apart."""
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
    """Whether the 2:4 product beats the dense one for a Linear on a GPU, with `tokens` rows of input."""
    sparse = copy.deepcopy(linear)
    to_semi_structured(sparse)
    x = torch.randn(1, tokens, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)

    def run(layer: nn.Linear) -> Callable[[], None]:
        def call() -> None:
            for _ in range(10):  # launching one takes longer than the product
                layer(x)
            torch.cuda.synchronize(x.device)

        return call

    with torch.inference_mode():
        dense_seconds, sparse_seconds = time_in_turns([run(linear), run(sparse)], RUNS, SECONDS)
    return statistics.median(sparse_seconds) < MARGIN * statistics.median(dense_seconds)


def time_in_turns(
    calls: list[Callable[[], object]], runs: int, seconds: float = float("inf"), pause: float = 0.0
) -> list[list[float]]:
    """Seconds of every run of every call; they take turns, so that what slows the machine slows all of them.

    Args:
        runs: how many turns.
        seconds: stop early after this long, but not before three turns.
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
