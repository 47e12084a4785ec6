"""Latencies that are told in the place of measured ones: no test goes by what a machine takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from cap_hf import Budget, CAPCompressor, CAPConfig
from cap_hf.collection import budgets
from cap_hf.targets import Target, find_targets
from support.models import build, random_batches


def predicted_points(
    model: nn.Module, targets: Sequence[Target], example: object, int8: bool, unit: int, advance: object
) -> tuple[list[list[tuple[int, float]]], float, float]:
    """Return what every layer takes: 1 s dense, no less up to 60 % sparsity, 0.1 s in the end; and all else 2 s."""
    units = [target.weight.numel() // unit for target in targets]
    return [[(0, 1.0), (round(0.6 * each), 1.0), (each, 0.1)] for each in units], 2.0, 2.0 + len(units)


def true_share(model: nn.Module) -> float:
    """Return what share of its dense time a model takes: layers gain in another way than predicted, and the rest too.

    A layer takes 1 s up to 60 % sparsity, then 0.9 s and ever less, 0.2 s in the end; the rest 1 s beside such.
    """
    sparsities = [float((target.weight == 0).double().mean()) for target in find_targets(model)]
    layers = [1.0 if each <= 0.6 else 0.9 - 1.75 * (each - 0.6) for each in sparsities]
    rest = 1.0 if any(each > 0.6 for each in sparsities) else 2.0
    return (rest + sum(layers)) / (2 + len(layers))


def said(replace: Callable[[Any, str, Any], object]) -> None:
    """Have budgets go by these seconds; `replace` sets an attribute, such as `setattr`."""
    replace(budgets, "latency_points", predicted_points)
    replace(budgets, "measure_share", lambda model, pruned, *args: (true_share(pruned), 1e-4))


def spend_budgets(accelerator: Accelerator | None = None) -> dict[str, torch.Tensor]:
    """Return what is 0 in a tiny ViT pruned to a budget of each kind, and the shares that came out."""
    model = build("ViT")
    (batch,) = random_batches(model, 8, sizes=(32,))
    examples = [{name: value[i] for name, value in batch.items()} for i in range(32)]
    compressor = CAPCompressor(model, CAPConfig(num_grads=32), accelerator, disable_tqdm=True)
    compressor.collect(DataLoader(examples, batch_size=4))
    found = {}
    for budget in (Budget("flops", 0.4), Budget("bytes", 0.6), Budget("latency", 0.5)):
        report = compressor.prune(budget)
        found[f"{budget}"] = torch.tensor(report.budget.achieved, dtype=torch.float64)
        found |= {f"{budget} {target.name}": (target.weight == 0).contiguous() for target in compressor.targets}
    return found
