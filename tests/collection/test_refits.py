"""A refit from a dataloader is all or nothing; what it computes is tested with `refitting`."""

import pytest
import torch
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection import refits
from cap_hf.collection.refits import refit_pruned
from cap_hf.errors import CAPError


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_moves_what_is_left_and_rounds_it(dtype):
    model = build("ViT")
    batches = random_batches(model, 8)
    compressor = CAPCompressor(model, CAPConfig(num_grads=8, refit_examples=8), disable_tqdm=True, dtype=dtype)
    compressor.collect(batches).prune(0.5)
    before = {target.name: target.weight.clone() for target in compressor.targets}
    assert refit_pruned(compressor, compressor.paths, batches).examples == 8
    for target in compressor.targets:
        assert torch.equal(target.weight == 0, before[target.name] == 0)
        assert not torch.equal(target.weight, before[target.name])
        if dtype is not None:
            assert torch.equal(target.weight, target.weight.to(dtype).float())


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = build("ViT")
    batches = random_batches(model, 8)
    compressor = CAPCompressor(model, CAPConfig(num_grads=8, refit_examples=8), disable_tqdm=True).collect(batches)
    compressor.prune(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = refits.refit

    def failing(*args):
        whole(*args)
        raise CAPError("what must not be")

    monkeypatch.setattr(refits, "refit", failing)
    with pytest.raises(CAPError, match="what must not be"):
        compressor.refit(batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
