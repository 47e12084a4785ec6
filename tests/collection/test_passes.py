"""What is said of the examples of a pass."""

import logging

import pytest
from support.models import build, random_batches
from support.short_memory import loader, squeeze

from cap_hf import CAPCompressor, CAPConfig, CAPError


@pytest.mark.parametrize("anew", [False, True])
def test_few_examples_and_dead_blocks_are_said_once(monkeypatch, caplog, anew):
    squeeze(monkeypatch, 1.0 if anew else 100.0, anew, block_size="row")
    model = build("ViT")
    model.vit.layers[0].mlp.fc2.weight.data.zero_()
    with caplog.at_level(logging.WARNING):
        compressor = CAPCompressor(model, CAPConfig(num_grads=100)).collect(loader(model, 24, batch_size=8))
        compressor.prune(0.5)
    assert compressor.plan.recollects == anew
    assert caplog.text.count("ended after 24 of 100") == 1
    assert caplog.text.count("blocks have no gradient at all") == 1
    with pytest.raises(CAPError, match="dataloader is empty"):
        CAPCompressor(model, CAPConfig(num_grads=100)).collect([])


def test_a_pass_leaves_the_model_in_the_mode_it_was_in(monkeypatch):
    squeeze(monkeypatch, 0.9, anew=True, block_size="row")
    model = build("ViT").train()
    compressor = CAPCompressor(model, CAPConfig(num_grads=16)).collect(random_batches(model, 8, sizes=(8, 8)))
    assert model.training
    compressor.prune(0.5)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
