"""What stays as it is while a model heals."""

import pytest
from support.models import build
from torch import nn

from cap_hf.recovery.freezing import frozen_outside, innermost


@pytest.mark.parametrize(("family", "inside"), [("ViT", "vit.layers."), ("Swin", "swin.encoder.layers.")])
def test_embeddings_and_head_are_frozen_and_come_back(family, inside):
    model = build(family)
    frozen = next(parameter for name, parameter in model.named_parameters() if name.startswith(inside))
    frozen.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), frozen_outside(model):
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name.startswith(inside) and parameter is not frozen), name
        raise KeyboardInterrupt
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_targets_that_only_the_model_holds_together_leave_nothing_outside():
    model = nn.ModuleDict({"one": nn.Sequential(nn.Linear(8, 8)), "other": nn.Sequential(nn.Linear(8, 8))})
    assert innermost(model) is model
