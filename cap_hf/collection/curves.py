"""The way of an elimination for a report: what the cheapest removals of a model cost, from the first to the last."""

from collections.abc import Sequence
from typing import Any

import torch

from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.config import CAPConfig
from cap_hf.masks import zero_units
from cap_hf.method.allocation import INFINITY_BITS, path_losses
from cap_hf.patterns import unit_of

# Losses are counted by the first bits of their float32: 32 bins per octave, so that a bin is 2 to 3 % wide.
DROPPED_BITS = 18
BINS = (INFINITY_BITS >> DROPPED_BITS) + 1
POINTS = 100


def removal_curve(paths: RemovalPaths, config: CAPConfig, points: int = POINTS) -> dict[str, Any] | None:
    """Return what the next removal costs, and all before it together, while the cheapest of all layers are taken.

    Every process calls it, after `eliminate`. It takes a pass over the losses and no sorting; losses are those of bins
    of 3 % at most.

    Args:
        paths: eliminated.
        config: for the selection.
        points: how many sparsities, evenly spaced between 0 and 1, without these two.

    Returns:
        `sparsity`, `(points,)`: share of the weights of all layers that are gone; `marginal`, `(points,)`: what the
        removals there are compared by, in units of the loss; `total`, `(points,)`: the sum of the losses so far;
        `layers`: for each target's name `(points,)` the share of its weights that is gone then. None for N:M, where
        nothing is compared between blocks.
    """
    if config.nm is not None:
        return None
    unit = unit_of(config.structure)
    counts = torch.zeros(len(paths.targets), BINS, dtype=torch.int64)
    sums = torch.zeros(BINS, dtype=torch.float64)
    for place, target in enumerate(paths.targets):
        losses = paths.losses[target.name]
        zeros = zero_units(paths.weights[target.name], unit).sum(dim=1)
        compared = path_losses(losses, zeros, config.selection)
        bins = (compared.view(torch.int32) >> DROPPED_BITS).flatten()
        counts[place] = torch.bincount(bins, minlength=BINS).cpu()
        # What is 0 already costs nothing to remove.
        own = losses.clamp_min(0).masked_fill(compared == 0, 0.0).flatten().cpu().double()
        sums += torch.bincount(bins.cpu(), own, minlength=BINS)
    counts, sums = paths.processes.sum(counts), paths.processes.sum(sums)
    sizes = [target.weight.numel() // unit for target in paths.targets]
    return _read(counts, sums, sizes, [target.name for target in paths.targets], points)


def _read(
    counts: torch.Tensor, sums: torch.Tensor, sizes: Sequence[int], names: Sequence[str], points: int
) -> dict[str, Any]:
    """Return what `removal_curve` does.

    Args:
        counts: `(targets, BINS)` how many removals of each target lie in each bin.
        sums: `(BINS,)` the sums of their losses.
        sizes: units of each target, of which the last ones may be none that can be removed.
        names: of the targets.
        points: how many sparsities.
    """
    total, below = sum(sizes), counts.sum(dim=0).cumsum(dim=0)
    wanted = torch.arange(1, points + 1, dtype=torch.float64) / (points + 1)
    wanted = wanted[wanted * total <= below[-1]]
    place = torch.searchsorted(below, (wanted * total).ceil().long().clamp_min(1))
    inside = counts.sum(dim=0)[place].double()
    part = (wanted * total - (below[place] - inside)) / inside
    middle = ((place << DROPPED_BITS) + (1 << (DROPPED_BITS - 1))).to(torch.int32).view(torch.float32).double()
    marginal = middle.masked_fill(place == 0, 0.0)
    spent = sums.cumsum(dim=0)
    layers = {}
    for name, size, own in zip(names, sizes, counts, strict=True):
        gone = own.cumsum(dim=0)[place] - own[place] * (1 - part)
        layers[name] = _rounded((gone / size).clamp(0, 1))
    return {
        "sparsity": _rounded(wanted),
        "marginal": _significant(marginal),
        "total": _significant(spent[place] - sums[place] * (1 - part)),
        "layers": layers,
    }


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _significant(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
