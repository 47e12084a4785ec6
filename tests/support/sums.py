"""Sums filled from batches, without a whole collection."""

from collections.abc import Iterable

from torch import nn

from cap_hf.collection.passes import fill as fill_sums
from cap_hf.collection.running import frozen


def fill(statistic: object, model: nn.Module, examples: Iterable) -> object:
    """Take (batch, gradient samples, draws) through a model as a collection does; return the statistic."""
    with frozen(model):
        fill_sums(statistic, model, examples)
    return statistic
