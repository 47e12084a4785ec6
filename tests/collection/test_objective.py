"""Which loss is chosen, and what that of features is measured by."""

import pytest
import torch
from support.backbones import tiny_dinov2
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection.examples import CalibrationExamples
from cap_hf.collection.objective import choose_loss, has_logits, make_loss, measure_deviations
from cap_hf.distributed.processes import Processes

BATCH = {"pixel_values": torch.randn(2, 3, 8, 8)}


def test_the_loss_is_the_first_that_model_and_data_allow():
    labels = {"labels": torch.tensor([0, 1])}
    model, headless = build("ViT"), tiny_dinov2()
    assert has_logits(model, BATCH)
    assert not has_logits(headless, BATCH)
    chosen = [
        choose_loss(wish, each, batch, Processes())
        for wish, each, batch in (
            (None, model, BATCH | labels),
            (None, model, BATCH),
            (None, headless, BATCH | labels),
            (None, model, None),
            ("sampled", model, BATCH | labels),
        )
    ]
    assert chosen == ["labels", "sampled", "features", "labels", "sampled"]


def test_the_config_says_afterwards_what_was_chosen():
    compressor = CAPCompressor(tiny_dinov2(), CAPConfig(num_grads=4)).collect([BATCH, BATCH])
    assert compressor.config.fisher_loss == "features"
    report = compressor.prune(0.5)
    assert report.num_zeros == round(0.5 * report.num_weights)
    assert compressor.config.fisher_loss == "features"


def test_deviations_are_measured_over_exactly_the_examples_of_the_gradients():
    model, config = tiny_dinov2(), CAPConfig(num_grads=6, fisher_loss="features")
    batches = [{"pixel_values": torch.randn(n, 3, 8, 8)} for n in (4, 4)]
    loss = make_loss(config, model)
    examples = CalibrationExamples(batches, config, Processes())
    measure_deviations(loss, model, (batch for batch, _ in examples.batches()), Processes(), True)
    pixels = torch.cat([each["pixel_values"] for each in batches])[:6]
    with torch.no_grad():
        tokens = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(loss.deviations["class"], tokens[:, 0].std(0, unbiased=False))
    torch.testing.assert_close(loss.deviations["patch"], tokens[:, 1:].flatten(0, 1).std(0, unbiased=False))


def test_what_cannot_be_gone_over_twice_or_is_not_finite_is_refused():
    config = CAPConfig(num_grads=4)
    with pytest.raises(CAPError, match="needs the examples twice: collect from a DataLoader or a list"):
        CAPCompressor(tiny_dinov2(), config).collect(iter([BATCH, BATCH]))
    with pytest.raises(CAPError, match="class features are NaN or infinite"):
        CAPCompressor(tiny_dinov2(), config).collect([{"pixel_values": torch.full((2, 3, 8, 8), torch.nan)}])
    with pytest.raises(
        CAPError, match="fisher_loss='sampled' is for models that tell classes apart, and Dinov2Model has no"
    ):
        CAPCompressor(tiny_dinov2(), CAPConfig(num_grads=4, fisher_loss="sampled")).collect([BATCH, BATCH])
    with pytest.raises(CAPError, match="dataloader is empty"):
        CAPCompressor(tiny_dinov2(), CAPConfig(num_grads=4, fisher_loss="features")).collect([])


@pytest.mark.parametrize(
    "changes", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}, {"num_labels": 1}]
)
def test_softmax_is_for_models_that_pick_one_label(changes):
    """Of others the features, their outputs, are kept, whatever labels there are: their own labels are no classes."""
    for labels in ({}, {"labels": torch.rand(2, 10)}, {"labels": torch.tensor([0, 1])}):
        compressor = CAPCompressor(build("ViT", **changes), CAPConfig(num_grads=4), disable_tqdm=True)
        report = compressor.collect([BATCH | labels] * 2).prune(0.5)
        assert (compressor.config.fisher_loss, report.loss > 0) == ("features", True)
    for wish in ("labels", "sampled"):
        compressor = CAPCompressor(build("ViT", **changes), CAPConfig(num_grads=4, fisher_loss=wish))
        with pytest.raises(CAPError, match=f"{wish}.* ViTForImageClassification is for .*: leave it out, or use 'feat"):
            compressor.collect([BATCH | {"labels": torch.tensor([0, 1])}])


def test_features_of_a_classifier_are_its_logits():
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=8, fisher_loss="features"))
    compressor.collect(random_batches(model, 8)).prune(0.5)
    assert compressor.report.loss > 0


@pytest.mark.parametrize("once", [False, True])
def test_what_is_no_batch_is_named_before_a_loss_is_chosen(once):
    batches = [(torch.zeros(2, 3), torch.zeros(2))]
    for model in (tiny_dinov2(), build("ViT")):
        with pytest.raises(CAPError, match="a batch is a tuple: give dicts of tensors"):
            CAPCompressor(model, CAPConfig(num_grads=2)).collect(iter(batches) if once else batches)
