"""The labels whose loss is taken."""

import pytest
import torch
from torch.nn import functional as F

from cap_hf.errors import CAPError
from cap_hf.method.losses import cross_entropy, sample_labels


def test_sampled_labels_follow_the_model():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    labels = sample_labels(probabilities.log().expand(1000, 4), uniforms)
    assert torch.bincount(labels, minlength=4).tolist() == [100, 0, 600, 300]


def test_the_loss_is_the_sum_over_examples():
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    one_by_one = sum(F.cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(5))
    torch.testing.assert_close(cross_entropy(logits, labels, None), one_by_one.float())
    torch.testing.assert_close(cross_entropy(logits, labels.int(), None), one_by_one.float())
    uniforms = torch.rand(5)
    sampled = sample_labels(logits, uniforms)
    torch.testing.assert_close(cross_entropy(logits, None, uniforms), cross_entropy(logits, sampled, None))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, -100, 1], r"has label -100, the model has classes 0 to 3: leave .* out, or use fisher_type='sampled'"),
        ([0, 4, 1], "has label 4"),
        ([0.0, 1.0, 2.0], "must be whole numbers"),
        ([[0], [1], [2]], "must be whole numbers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(CAPError, match=message):
        cross_entropy(torch.randn(3, 4), torch.tensor(labels), None)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(CAPError, match="has no labels: add them, or use fisher_type='sampled'"):
        cross_entropy(torch.zeros(2, 3), None, None)
