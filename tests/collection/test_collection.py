"""A whole collection; passes, resume and processes have files of their own."""

import logging

import pytest
import torch
from support.models import build, random_batches
from support.sums import fill
from torch import nn

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.passes import mean_diagonals
from cap_hf.collection.resources import Resources
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.targets import find_targets


def test_the_mean_diagonal_is_that_of_the_fisher():
    model = build("ViT")
    statistic = fill(GradientSums(find_targets(model)), model, [(random_batches(model, 8)[0], 4, None)])
    for name, mean in mean_diagonals(statistic, Processes()).items():
        diagonal = statistic.sums[name].full().diagonal(dim1=1, dim2=2) / 4
        assert mean == pytest.approx(float(diagonal.mean()))


class Twice(nn.Module):
    """A model of which two modules compute with one weight."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.classifier = nn.Linear(6, 3)
        if shared:
            self.second.weight = self.first.weight
        self.dtype = torch.float32

    def forward(self, pixel_values):
        x = pixel_values.flatten(1)[:, :6]
        return (self.classifier(self.second(self.first(x).tanh())),)


def test_a_weight_that_two_modules_share_is_pruned_once_by_the_gradients_of_both():
    """Both were targets: 60 % were asked for, 2,458 zeros reported and 2,400 there."""
    model = Twice()
    (target,) = find_targets(model)
    assert (target.name, target.twins) == ("first", (model.second,))
    pixels, labels = torch.randn(8, 1, 2, 3), torch.randint(0, 3, (8,))
    compressor = CAPCompressor(model, CAPConfig(num_grads=8)).collect([{"pixel_values": pixels, "labels": labels}])
    expected = torch.zeros(6, 6, 6)
    for image, label in zip(pixels, labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None])[0], label[None])
        (grad,) = torch.autograd.grad(loss, model.first.weight)
        expected += grad[:, :, None] * grad[:, None, :]
    torch.testing.assert_close(compressor.fisher.sums["first"].full(dtype=torch.float32), expected)
    report = compressor.prune(0.5)
    assert report.num_zeros == int((model.second.weight == 0).sum()) == 18
    assert report.num_weights == 36
    sparsegpt = CAPCompressor(Twice(), CAPConfig(num_grads=8, method="sparsegpt"))
    sparsegpt.collect([{"pixel_values": pixels, "labels": labels}])
    x = pixels.flatten(1)
    hidden = Twice().first(x).tanh().detach()
    inputs = sparsegpt.fisher.sums["first"].full(dtype=torch.float32)[0]
    torch.testing.assert_close(inputs, x.T @ x + hidden.T @ hidden)


def test_data_that_ends_early_or_is_not_there(caplog):
    model = build("ViT")
    with caplog.at_level(logging.WARNING):
        CAPCompressor(model, CAPConfig(num_grads=100)).collect(random_batches(model, 8))
    assert "ended after 8 of 100" in caplog.text
    with pytest.raises(CAPError, match="dataloader is empty"):
        CAPCompressor(model, CAPConfig(num_grads=100)).collect([])


def test_collecting_again_leaves_nothing_of_the_first_time(tmp_path, monkeypatch):
    model = build("ViT")
    resources = Resources(spill_dir=str(tmp_path))
    monkeypatch.setattr("cap_hf.collection.planning.available_bytes", lambda *_: 250_000)
    monkeypatch.setattr("cap_hf.collection.planning.extra_seconds", lambda plan, *_: float(plan.recollects))
    monkeypatch.setattr("cap_hf.collection.solver.BATCH_BYTES", 2**13)
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), resources=resources)
    compressor.collect(random_batches(model, 8))
    assert len(compressor.plan.passes) > 1
    (first,) = tmp_path.iterdir()
    compressor.collect(random_batches(model, 8))
    (second,) = tmp_path.iterdir()
    assert first != second
