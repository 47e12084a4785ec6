"""How long a model takes here, dense and pruned: predicted from the times of its layers, and measured.

A layer is timed alone, dense and at several sparsities, in the form that `optimize_for_inference` would choose for it;
how much faster than dense it is there is taken to be how much faster it is in the model. A layer becomes faster only
beyond some sparsity, and not in proportion to it. What else the model computes takes what is left of its dense time.
What this leaves out, such as a GELU that a layer ends with, blocks, patches and attention in int8 and caches, shows
where the pruned model itself is measured.

Seconds are those of a clock on the wall, and models take turns with pauses between, as in `cap-hf benchmark`.
"""

import copy
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter as clock
from typing import Any, NamedTuple

import torch
from torch import nn

from cap_hf.checkpoints.int8 import LEAST_PRUNED, is_pruned
from cap_hf.inference.benchmark import PAUSE
from cap_hf.inference.choice import LEAST_SPARSITY, MARGIN, STEP, Kind, random_linear, time_in_turns
from cap_hf.inference.int8_linear import DenseInt8Linear, has_dense_int8
from cap_hf.inference.int8_packing import WORD, is_quantizable
from cap_hf.inference.linear import stored_weight
from cap_hf.inference.optimize import choose_kind, find_sparse_linears, int8_kind, optimize_for_inference
from cap_hf.models import uncompiled
from cap_hf.targets import Target
from cap_hf.towers import see

# Sparsities that a layer is timed at, in multiples of `STEP`: 0, 20 %, ..., more closely where layers are fast.
STEPS = (0, 4, 6, 8, 10, 12, 13, 14, 15, 16, 17, 18, 19, 20)
# So far before the sparsity from which on it is another layer, a layer is dense.
NEAR = 1e-4
# How long layers of one shape take turns, and whole models, unless so many turns take less: long enough that what else
# the machine does for a moment is no large part of it.
LAYER_SECONDS, MODEL_SECONDS, RUNS = 1.5, 4.0, 1000
# Whole models take turns for so long again, up to so many times, until the standard error is this part of the share.
BOUTS, PRECISION = 4, 0.003


class Measured(NamedTuple):
    """What share of its dense latency a model takes, and the standard error of that."""

    share: float
    error: float


# Sparsities, rising from 0 to 1, and of each the share of the dense time that a layer takes.
Curve = tuple[tuple[float, float], ...]


def sparse_layers(targets: Sequence[Target], int8: bool) -> list[str]:
    """Return the names of the targets that `optimize_for_inference` could make sparse."""
    found = []
    for target in targets:
        module = target.module
        # As `find_sparse_linears` has it.
        plain = type(module) is nn.Linear and not target.twins and not hasattr(module, "_hf_hook")
        if plain and (not int8 or is_quantizable(module.weight)):
            found.append(target.name)
    return found


@functools.cache
def relative_times(rows: int, cols: int, tokens: int, bias: bool, int8: bool, unit: int, threads: int) -> Curve:
    """Return what share of its dense time a Linear takes at several sparsities, in the form that it would run in.

    Args:
        rows, cols: the shape of its weight.
        tokens: rows of its input.
        bias: whether it has one.
        int8: whether it may run in int8.
        unit: weights that are removed together; of words of four only whole ones are faster in int8.
        threads: PyTorch's number of them; another number is measured anew.

    Raises:
        CAPError: int8 cannot run here.
    """
    sparse: Kind = int8_kind() if int8 else choose_kind("auto")
    exact: Kind = choose_kind("auto")
    dense = random_linear(rows, cols, 0, 0, bias)
    pruned = {steps: random_linear(rows, cols, steps, steps if unit % WORD == 0 else 0, bias) for steps in STEPS[1:]}
    layers: dict[tuple[Any, int], nn.Module] = {(None, 0): dense}
    layers |= {(exact, steps): exact(linear) for steps, linear in pruned.items()}
    if int8:
        layers |= {(sparse, steps): sparse(linear) for steps, linear in pruned.items()}
        if has_dense_int8():
            layers[DenseInt8Linear, 0] = DenseInt8Linear(dense)
    x = torch.randn(1, tokens, cols, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        taken = time_in_turns([partial(layer, x) for layer in layers.values()], RUNS, LAYER_SECONDS)
    # The least, by which `optimize_for_inference` chooses too.
    ratios = {key: min(own) / min(taken[0]) for key, own in zip(layers, taken, strict=True)}
    dense_int8 = ratios.get((DenseInt8Linear, 0), 1.0)

    def chosen(steps: int) -> float:
        """Return the ratio of the form that is chosen at a sparsity."""
        best = ratios[exact, steps] if steps * STEP >= LEAST_SPARSITY and ratios[exact, steps] < MARGIN else 1.0
        if int8 and (quantized := min(ratios[sparse, steps], dense_int8)) < MARGIN * best:
            best = quantized
        return best

    points = {LEAST_PRUNED: dense_int8} if int8 and dense_int8 < MARGIN else {}
    points |= {round(steps * STEP, 12): chosen(steps) for steps in STEPS[1:]}
    curve, least = {0.0: 1.0}, 1.0
    for sparsity, ratio in points.items():
        if ratio < least == 1.0:
            # It is dense up to where it is another layer.
            curve[sparsity - NEAR] = 1.0
        # More zeros make no layer slower: what says so is noise.
        curve[sparsity] = least = min(ratio, least)
    return tuple(curve.items())


class Watch:
    """The seconds that layers take in one forward pass after the other, while it is entered.

    Attributes:
        passes: of each forward pass the seconds of every layer; who runs one adds an empty dict before.
        tokens: rows of each layer's input, the most of all its calls.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.passes: list[dict[str, float]] = []
        self.tokens: dict[str, int] = {}
        self._begun = 0.0

    def __enter__(self) -> "Watch":
        self._handles = [
            handle
            for name, layer in self.layers.items()
            for handle in (
                layer.register_forward_pre_hook(partial(self._before, name)),
                layer.register_forward_hook(partial(self._after, name)),
            )
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str, layer: nn.Module, args: tuple) -> None:
        self._begun = clock()

    def _after(self, name: str, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seconds = clock() - self._begun
        self.tokens[name] = max(self.tokens.get(name, 0), output.numel() // output.shape[-1])
        self.passes[-1][name] = self.passes[-1].get(name, 0.0) + seconds


def latency_points(
    model: nn.Module,
    targets: Sequence[Target],
    example_inputs: Mapping[str, torch.Tensor],
    int8: bool,
    unit: int,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[list[list[tuple[int, float]]], float, float]:
    """Return what each target is predicted to take with ever more units removed, and what the whole model takes dense.

    Args:
        model: on any device; a copy of it is measured on the CPU.
        targets: of the model.
        example_inputs: what it is called with.
        int8: whether layers may run in int8.
        unit: weights that are removed together.
        advance: told of every target that is done.

    Returns:
        For each target numbers of removals and seconds, linear in between, 0 s where it could not be made sparse; the
        seconds of all else; and those of the dense model.

    Raises:
        CAPError: the model fails on the example, or int8 cannot run here.
    """
    names = sparse_layers(targets, int8)
    dense, example = on_cpu(model), {name: value.cpu() for name, value in example_inputs.items()}
    watch, totals = Watch({name: dense.get_submodule(name) for name in names}), []

    def run() -> None:
        watch.passes.append({})
        start = clock()
        see(dense, example)
        totals.append(clock() - start)

    with uncompiled(dense), torch.inference_mode(), watch:
        time_in_turns([run], RUNS, MODEL_SECONDS, pause=PAUSE)
    # The first run is slower than all that follow.
    total, passes = statistics.median(totals[1:]), watch.passes[1:]
    seconds = {name: statistics.median([each[name] for each in passes]) for name in watch.tokens}
    points = []
    for target in targets:
        units = target.weight.numel() // unit
        if target.name not in seconds:
            points.append([(0, 0.0), (units, 0.0)])
            continue
        rows, cols = target.weight.shape
        bias = target.module.bias is not None
        curve = relative_times(rows, cols, watch.tokens[target.name], bias, int8, unit, torch.get_num_threads())
        found = {math.ceil(sparsity * units - 1e-6): seconds[target.name] * share for sparsity, share in curve}
        # Of few units 1 % may be none: where nothing is removed, nothing runs in int8.
        points.append(sorted((found | {0: seconds[target.name]}).items()))
        advance(1)
    return points, max(0.0, total - sum(seconds.values())), max(total, sum(seconds.values()))


def measure_share(
    model: nn.Module, pruned: nn.Module, example_inputs: Mapping[str, torch.Tensor], int8: bool
) -> Measured:
    """Return what share of the time that a model takes for an example in plain PyTorch a pruned one does, optimised.

    Args:
        model: on any device; a copy of it is measured on the CPU. Its zeros make no difference.
        pruned: a copy of it from `on_cpu`, with other zeros; it is optimised in place.
        example_inputs: what both are called with.
        int8: whether layers may run in int8.

    Returns:
        The median of all turns of the one as shares of the other's beside them; exactly 1 where no layer has so many
        zeros that it would be replaced.

    Raises:
        CAPError: as of `optimize_for_inference`.
    """
    layers = find_sparse_linears(pruned).values()
    if not any(not int8 or is_pruned(stored_weight(layer)) for layer in layers):
        return Measured(1.0, 0.0)
    example = {name: value.cpu() for name, value in example_inputs.items()}
    dense = on_cpu(model)
    sparse = optimize_for_inference(pruned, example_inputs=example, dtype="int8" if int8 else "float32")
    shares: list[float] = []
    with uncompiled(dense), torch.inference_mode():
        calls: list[Callable[[], object]] = [partial(see, dense, example), partial(see, sparse, example)]
        for _ in range(BOUTS):
            turns = zip(*time_in_turns(calls, RUNS, MODEL_SECONDS, pause=PAUSE, warm=True), strict=True)
            shares += [optimised / taken for taken, optimised in turns]
            found = median_with_error(shares)
            if found.error <= PRECISION * found.share:
                break
    return found


def median_with_error(values: Sequence[float]) -> Measured:
    """Return the median of some values and its standard error, whatever they are distributed as.

    How many of n values lie below the true median has a standard deviation of sqrt(n) / 2, so that the error is half
    the distance of the values that stand so far below and above the middle (Conover, Practical Nonparametric
    Statistics, 1999, section 3.2).
    """
    count, step = len(values), 0.5 / len(values) ** 0.5
    cuts = torch.tensor([max(0.0, 0.5 - step), 0.5, min(1.0, 0.5 + step)], dtype=torch.float64)
    low, middle, high = torch.quantile(torch.tensor(values, dtype=torch.float64), cuts).tolist()
    return Measured(middle, (high - low) / 2 if count > 1 else math.inf)


def on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the CPU, in float32 and ready to be run."""
    return copy.deepcopy(model).cpu().float().eval()
