"""A refit takes as many examples as memory holds."""

import copy

import torch
from support.models import build, random_batches

import cap_hf.collection.fitting as fitting_module
import cap_hf.collection.refitting as refitting_module
from cap_hf import CAPCompressor, CAPConfig, Resources
from cap_hf.collection.fitting import AT_ONCE, fitting, num_examples


def test_so_many_examples_as_their_widest_activation_allows(monkeypatch):
    monkeypatch.setattr(fitting_module, "LEAST", 3)
    model = build("ViT")
    batches = [(batch, 8 * number) for number, batch in enumerate(random_batches(model, 8, sizes=(8, 8, 8)))]
    tokens = model.vit.embeddings(batches[0][0]["pixel_values"]).shape[1]
    widest = 4 * tokens * model.config.intermediate_size
    for examples in (1, 7, 8, 13, 24, 99):
        kept = fitting(batches, model, AT_ONCE * widest * examples + widest)
        assert num_examples(kept) == min(max(examples, 3), 24)
        assert [start for _, start in kept] == [0, 8, 16][: len(kept)]
        together = torch.cat([batch["pixel_values"] for batch, _ in kept])
        assert torch.equal(together, torch.cat([batch["pixel_values"] for batch, _ in batches])[: len(together)])
    assert num_examples(fitting(batches, model, 0)) == 3


def test_fewer_are_told_of_and_are_the_first(monkeypatch, caplog):
    monkeypatch.setattr(fitting_module, "LEAST", 1)
    batches, found = random_batches(build("ViT"), 8, sizes=(8, 8)), []
    for count, available in ((16, 0), (1, 10**12)):
        model = copy.deepcopy(build("ViT"))
        compressor = CAPCompressor(model, CAPConfig(num_grads=16, refit_examples=count), resources=Resources())
        compressor.collect(batches).prune(0.5)
        monkeypatch.setattr(refitting_module, "available_bytes", lambda *_, free=available: free)
        assert compressor.refit(batches).refit.examples == 1
        found.append(model.state_dict())
    assert "Refitting to 1 of 16 examples: more do not fit into memory." in caplog.text
    assert "ended after" not in caplog.text
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
