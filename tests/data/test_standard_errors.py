"""Standard errors against numpy, and against what many draws of the examples show."""

import math

import numpy as np
import pytest
import torch

from cap_hf.data.standard_errors import drop_errors, standard_error, summarize


def test_standard_errors():
    hits = torch.tensor([True, True, True, False])
    assert standard_error(hits) == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    losses = torch.tensor([1.0, 4.0, 2.5])
    assert summarize({"top1": hits, "loss": losses}) == pytest.approx(
        {"top1": 0.75, "top1_se": math.sqrt(0.75 * 0.25 / 4), "loss": 2.5, "loss_se": np.std([1, 4, 2.5]) / 3**0.5}
    )


def test_a_drop_is_paired():
    hits, other = torch.tensor([True, True, True, False]), torch.tensor([True, False, True, False])
    found = drop_errors({"top1": hits, "top5": hits}, {"top1": other, "loss": torch.ones(4)})
    assert found == {"top1_drop_se": pytest.approx(float(np.std([0, 1, 0, 0])) / 2)}
    assert drop_errors({"top1": hits}, {"top1": hits}) == {"top1_drop_se": 0}


def test_the_error_of_a_drop_is_how_far_it_scatters():
    """Over 2,000 draws of 400 examples, on which two models agree more often than by chance."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(2000, 400, generator=generator) < 0.8
    sparse = dense & (torch.rand(2000, 400, generator=generator) < 0.9)
    drops = dense.double().mean(dim=1) - sparse.double().mean(dim=1)
    told = [drop_errors({"x": a}, {"x": b})["x_drop_se"] for a, b in zip(dense[:200], sparse[:200], strict=True)]
    assert float(drops.std()) == pytest.approx(np.mean(told), rel=0.05)
