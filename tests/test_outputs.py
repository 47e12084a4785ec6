"""Logits, however a model packs them."""

import pytest
import torch
from support.models import build, random_batches
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from cap_hf.errors import CAPError
from cap_hf.outputs import logits_of


def test_logits_are_found_by_name_or_in_front():
    logits = torch.randn(2, 3)
    assert logits_of(ImageClassifierOutput(logits=logits)) is logits
    assert logits_of((logits, torch.zeros(2, 4, 5))) is logits


@pytest.mark.parametrize("outputs", [BaseModelOutput(last_hidden_state=torch.zeros(2, 4, 5)), (), "nothing"])
def test_what_has_none_is_refused(outputs):
    with pytest.raises(CAPError, match="without logits .* use an image classifier"):
        logits_of(outputs)


@pytest.mark.parametrize("name", ["ViT", "DeiT"])
def test_a_model_that_returns_tuples_gives_the_same(name):
    model = build(name)
    pixels = random_batches(model, 8)[0]["pixel_values"]
    with torch.inference_mode():
        named = logits_of(model(pixel_values=pixels))
        assert torch.equal(logits_of(model(pixel_values=pixels).to_tuple()), named)
