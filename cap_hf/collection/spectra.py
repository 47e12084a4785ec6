"""Eigenvalues of the block Fisher of a few layers, for a report."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.method.fisher import BlockFisher
from cap_hf.targets import Target

# Eigenvalues take the cube of this: a larger block is told by its first weights.
MOST_WEIGHTS = 768
# Of how many layers, and how many eigenvalues of each are kept, evenly spaced in the logarithm of their rank.
LAYERS, KEPT = 6, 60

T = TypeVar("T")


def spectra(paths: RemovalPaths, layers: int = LAYERS) -> list[dict[str, Any]]:
    """Return the eigenvalues of one block of a few layers, spread over the model; none where F is not in memory.

    A process looks at blocks of its own, and tells nobody.

    Args:
        paths: of the model, after `collect`.
        layers: of how many layers.

    Returns:
        For each layer its `name`, the `size` B of its blocks, how many `weights` of the block were looked at, how many
        `samples` of gradients F is made of, the `damp` that is added to it, and per `kind` ("gradients", and "with
        prior" where there is one) the eigenvalues: their `ranks`, from 1, and `values`, from the largest one.
    """
    fisher = paths.solver.fisher
    if fisher is None or paths.recollection is not None:
        return []
    owned = [target for target in paths.targets if len(paths.weights[target.name])]
    found = [_spectrum(fisher, target) for target in spread(owned, layers)]
    fisher.release()
    return found


def spread(values: Sequence[T], count: int) -> list[T]:
    """Return so many of some values, evenly spaced from the first to the last; all, where there are no more."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / max(1, count - 1))] for place in range(count)]


def _spectrum(fisher: BlockFisher, target: Target) -> dict[str, Any]:
    first, size = slice(0, 1), min(target.block_size, MOST_WEIGHTS)
    matrices = {"with prior": fisher.damped(target, first, 0.0)[0]}
    if fisher.prior is None:
        matrices = {"gradients": matrices["with prior"]}
    else:
        matrices = {"gradients": fisher.sums[target.name].full(first)[0] / fisher.count} | matrices
    kinds = {}
    for kind, matrix in matrices.items():
        values = torch.linalg.eigvalsh(matrix[:size, :size].double()).flip(0).clamp_min(0).cpu()
        ranks = sorted({round(size ** (place / (KEPT - 1))) for place in range(KEPT)})
        kinds[kind] = {"ranks": ranks, "values": [float(f"{values[rank - 1]:.4g}") for rank in ranks]}
    return {
        "name": target.name,
        "size": target.block_size,
        "weights": size,
        "samples": fisher.count,
        "damp": fisher.damps[target.name],
        "kinds": kinds,
    }
