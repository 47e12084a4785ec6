"""The losses of the Fisher: labels of the data or the model, features through random projections."""

import pytest
import torch
from support.backbones import tiny_dinov2
from support.sums import fill
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.kept_states import WholeModel
from cap_hf.errors import CAPError
from cap_hf.method.losses import (
    Deviations,
    FeatureLoss,
    LabelLoss,
    SampledLabelLoss,
    cross_entropy,
    inverse,
    random_signs,
    sample_labels,
)
from cap_hf.outputs import features_of
from cap_hf.targets import find_targets


def test_labels_are_drawn_as_often_as_the_model_says():
    probabilities = torch.tensor([0.1, 0.2, 0.0, 0.7])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    labels = sample_labels(probabilities.log().expand(1000, 4), uniforms)
    assert labels.bincount(minlength=4).tolist() == [100, 200, 0, 700]


def test_the_loss_is_the_sum_over_examples():
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    one_by_one = sum(F.cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(5))
    torch.testing.assert_close(cross_entropy(logits, labels), one_by_one.float())
    outputs = ImageClassifierOutput(logits=logits)
    torch.testing.assert_close(LabelLoss()(outputs, labels.int(), None), one_by_one.float())
    uniforms = SampledLabelLoss().draws(5, seed=3)
    sampled = sample_labels(logits, uniforms)
    torch.testing.assert_close(SampledLabelLoss()(outputs, None, uniforms), cross_entropy(logits, sampled))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -100, 1], r"has label -100, the model has classes 0 to 3: leave .* out, or use fisher_loss='sampled'"),
        ([0, 4, 1], "has label 4"),
        ([0.0, 1.0, 2.0], "must be whole numbers"),
        ([[0], [1], [2]], "must be whole numbers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(CAPError, match=message):
        cross_entropy(torch.randn(3, 4), torch.tensor(labels))


def test_a_batch_without_labels_is_refused():
    outputs = ImageClassifierOutput(logits=torch.zeros(2, 3))
    with pytest.raises(CAPError, match="has no labels: add them, or use fisher_loss='sampled'"):
        LabelLoss()(outputs, None, None)


def test_a_seed_gives_the_same_signs_in_any_batch():
    seeds = torch.tensor([5, 2**61, 7])
    signs = random_signs(seeds, 10_000)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert torch.equal(random_signs(seeds[1:2], 10_000)[0], signs[1])
    products = signs.double() @ signs.double().mT / 10_000
    assert (products - torch.eye(3)).abs().max() < 0.05


def test_deviations_are_those_over_all_examples_and_positions():
    parts = [{"patch": torch.randn(n, 4, 3, dtype=torch.float64) + 100} for n in (2, 5)]
    deviations = Deviations()
    for each in parts:
        deviations.add(each)
    values = torch.cat([each["patch"] for each in parts]).flatten(0, 1)
    torch.testing.assert_close(deviations.finish()["patch"], values.std(0, unbiased=False).float())


def test_a_channel_that_does_not_vary_does_not_count_and_one_that_hardly_does_counts_little():
    torch.testing.assert_close(inverse(torch.tensor([0.0, 2.0, 1e-9])), torch.tensor([0.0, 0.5, 500.0]))
    assert inverse(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_the_fisher_of_the_features_is_their_gauss_newton_matrix():
    """Against `J^T D J` of the Jacobian J computed in full: of many projections the mean comes as near as it must."""
    model = tiny_dinov2(hidden_size=8, image_size=4, patch_size=2, num_channels=1).double()
    pixels = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    weights = {"class": 2.0, "patch": 1.0, "pooled": 0.5}
    loss = FeatureLoss(weights, prefix_tokens=1)
    deviations = Deviations()
    with torch.no_grad():
        deviations.add(features_of(model(pixel_values=pixels), 1))
    loss.deviations = deviations.finish()
    (target,) = find_targets(model, include=["*.0.mlp.fc1"])

    def factored(weight: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        outputs = functional_call(model, {f"{target.name}.weight": weight}, (), {"pixel_values": image[None]})
        parts = {
            "class": outputs.last_hidden_state[0, :1],
            "patch": outputs.last_hidden_state[0, 1:],
            "pooled": outputs.pooler_output,
        }
        scaled = [(weights[k] / f.numel()) ** 0.5 * f / loss.deviations[k].double() for k, f in parts.items()]
        return torch.cat([each.flatten() for each in scaled])

    expected = 0
    for image in pixels:
        jacobian = jacrev(factored)(target.weight.detach(), image).flatten(1)
        expected = expected + jacobian.mT @ jacobian / len(pixels)
    row = target.block_size
    blocks = torch.stack([expected[i : i + row, i : i + row] for i in range(0, len(expected), row)])

    errors = []
    for projections in (64, 1024):
        draws = loss.draws(projections * 3, seed=1)
        batch = {"pixel_values": pixels.repeat(projections, 1, 1, 1)}
        statistic = GradientSums([target], through=WholeModel(loss))
        sums = fill(statistic, model, [(batch, 3 * projections, draws)]).sums[target.name]
        found = sums.full() / (3 * projections)
        errors.append(float((found - blocks).norm() / blocks.norm()))
    # Sixteen times as many projections leave a quarter of the error.
    assert errors[1] < 0.1
    assert errors[1] < 0.5 * errors[0]


def test_each_feature_counts_by_its_deviation_and_each_part_by_its_weight():
    """The loss itself, with the signs spelled out."""
    outputs = BaseModelOutputWithPooling(last_hidden_state=torch.randn(2, 3, 2), pooler_output=torch.randn(2, 4))
    loss = FeatureLoss({"class": 0.0, "patch": 3.0, "pooled": 1.0}, prefix_tokens=1)
    loss.deviations = {"patch": torch.tensor([2.0, 0.5]), "pooled": torch.tensor([1.0, 2.0, 4.0, 8.0])}
    seeds = torch.tensor([1, 2])
    signs = random_signs(seeds, 8).float()
    patches = outputs.last_hidden_state[:, 1:]
    expected = (signs[:, :4].view(2, 2, 2) * patches / loss.deviations["patch"]).sum() * (3 / 4) ** 0.5
    expected = expected + (signs[:, 4:] * outputs.pooler_output / loss.deviations["pooled"]).sum() * (1 / 4) ** 0.5
    torch.testing.assert_close(loss(outputs, None, seeds), expected)


def test_features_without_a_weight_are_refused():
    outputs = BaseModelOutputWithPooling(last_hidden_state=torch.randn(2, 3, 2))
    loss = FeatureLoss({"class": 1.0, "patch": 0.0, "pooled": 1.0})
    with pytest.raises(CAPError, match="features are patch, and none of these has a weight: .*--patch_weight 1"):
        loss.features(outputs)
