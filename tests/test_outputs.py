"""Logits, however a model packs them, and the names of its classes."""

import pytest
import torch
from support.models import build, random_batches
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from cap_hf.errors import CAPError
from cap_hf.outputs import check_task, label_names, logits_of, other_task


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


def test_classes_have_their_names_in_the_order_of_their_numbers():
    config = PretrainedConfig(num_labels=2)
    config.id2label = {"10": "eel", "2": "cat"}
    assert list(label_names(config).items()) == [(2, "cat"), (10, "eel")]


def test_a_config_without_classes_has_no_names():
    config = PretrainedConfig()
    config.id2label = None
    assert label_names(config) == {}


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({}, None),
        ({"problem_type": "single_label_classification"}, None),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "regression"),
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 0}, "no labels"),
    ],
)
def test_a_classifier_that_picks_no_label_of_several_is_told_apart(changes, task):
    model = build("ViT", **changes)
    assert other_task(model) == task
    if task is None:
        check_task(model, "this is", "go on")
    else:
        with pytest.raises(CAPError, match=f"this is for models that pick one .* is for {task}: go on"):
            check_task(model, "this is", "go on")
