"""Means over examples with their standard errors: of one model, and of how much lower than the dense model's it is."""

from collections.abc import Mapping

import torch


def standard_error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of some values, `(n,)`.

    Of zeros and ones it is that of a share, `sqrt(p (1 - p) / n)`; of the differences of two models' hits on the same
    examples it is that of the difference, in which what is hard for both does not count.
    """
    return float(values.double().std(correction=0)) / len(values) ** 0.5


def summarize(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return by name the mean of values `(n,)`, one per example, and its standard error as `_se`."""
    found: dict[str, float] = {}
    for name, each in values.items():
        found |= {name: float(each.double().mean()), f"{name}_se": standard_error(each)}
    return found


def drop_errors(dense: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return by name as `_drop_se` the standard error of how much lower the mean is than that of the dense model.

    Args:
        dense: values `(n,)` of the dense model, one per example.
        values: of another one, on the same examples in the same order.
    """
    return {
        f"{name}_drop_se": standard_error(dense[name].double() - own.double())
        for name, own in values.items()
        if name in dense
    }
