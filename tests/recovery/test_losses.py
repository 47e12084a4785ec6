"""Each loss against its definition, written out."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.utils import ModelOutput

from cap_hf.recovery.losses import (
    NO_LABEL,
    feature_loss,
    hidden_state_loss,
    label_loss,
    label_shares,
    logit_loss,
    student_logits,
)


def written_out(logits, labels, smoothing):
    """Cross entropy example by example; those without a label do not count."""
    classes, losses = logits.shape[1], []
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        if label == NO_LABEL:
            continue
        logs = row - row.exp().sum().log()
        shares = [smoothing / classes + (1 - smoothing) * (index == label) for index in range(classes)]
        losses.append(-sum(share * float(log) for share, log in zip(shares, logs, strict=True)))
    return sum(losses) / len(losses) if losses else 0.0


@given(st.lists(st.sampled_from([NO_LABEL, 0, 1, 2]), min_size=1, max_size=6), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=40, deadline=None)
def test_the_label_loss_is_the_mean_over_examples_that_have_a_label(labels, smoothing):
    labels = torch.tensor(labels)
    logits = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for form in (labels, label_shares(labels, 3)):
        loss = label_loss(logits, form, smoothing)
        assert float(loss.detach()) == pytest.approx(written_out(logits.detach(), labels, smoothing), rel=1e-4)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()
        assert not gradient[labels == NO_LABEL].any()


def test_with_every_label_it_is_pytorchs_to_the_bit():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 4), torch.randint(0, 4, (8,))
    assert torch.equal(label_loss(logits, labels, 0.1), F.cross_entropy(logits, labels, label_smoothing=0.1))


def test_a_label_that_no_class_has_is_an_error_and_not_a_class():
    with pytest.raises((IndexError, RuntimeError)):
        label_loss(torch.zeros(2, 3), torch.tensor([0, -1]))
    with pytest.raises((IndexError, RuntimeError)):
        label_shares(torch.tensor([0, -1]), 3)


def test_the_logit_loss_is_the_divergence_times_the_squared_temperature():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = ((logits / 3).softmax(-1) for logits in (teacher, student))
    expected = 9 * sum(p[i, j] * torch.log(p[i, j] / q[i, j]) for i in range(5) for j in range(7)) / 5
    assert float(logit_loss(student, teacher, 3.0)) == pytest.approx(float(expected), rel=1e-5)
    assert float(logit_loss(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


def test_the_hidden_state_loss_does_not_depend_on_scale():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = float((student - teacher).square().sum() / teacher.square().sum())
    assert float(hidden_state_loss([student], [teacher])) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_state_loss([student, 100 * student], [teacher, 100 * teacher])) == pytest.approx(
        expected, rel=1e-5
    )


def test_hidden_states_of_zeros_are_no_division_by_zero():
    assert hidden_state_loss([torch.zeros(2, 3)], [torch.zeros(2, 3)]) == 0


def test_each_head_learns_from_its_own():
    one = torch.zeros(1, 2)
    own, taught = student_logits(ModelOutput(logits=one))
    assert own is taught is one
    heads = ModelOutput(logits=one, cls_logits=one + 1, distillation_logits=one + 2)
    own, taught = student_logits(heads)
    assert own is heads["cls_logits"]
    assert taught is heads["distillation_logits"]


def test_the_feature_loss_is_the_share_of_the_teachers_variance_that_is_missed():
    torch.manual_seed(0)
    teacher = {"class": torch.randn(6, 1, 3), "patch": torch.randn(6, 4, 5) * 20}
    student = {name: each + torch.randn(each.shape) for name, each in teacher.items()}
    shares = []
    for name, target in teacher.items():
        rows, own = target.reshape(-1, target.shape[-1]), student[name].reshape(-1, target.shape[-1])
        variance = sum(statistics.variance(rows[:, channel].tolist()) for channel in range(rows.shape[1]))
        shares.append(float((own - rows).square().sum()) / len(rows) / variance)
    assert float(feature_loss(student, teacher)) == pytest.approx(sum(shares) / 2, rel=1e-5)


def test_what_all_images_have_in_common_does_not_make_an_error_look_small():
    """Nor does a part that the teacher has and nobody learns."""
    torch.manual_seed(0)
    teacher = {"class": torch.randn(6, 1, 3)}
    student = {"class": torch.randn(6, 1, 3)}
    moved = [{"class": each["class"] + 1000} for each in (student, teacher)]
    expected = float(feature_loss(student, teacher))
    assert float(feature_loss(*moved)) == pytest.approx(expected, rel=1e-2)
    assert float(feature_loss(student, teacher | {"pooled": torch.ones(6, 1, 9)})) == expected
    # Who gives every image the same misses everything, but for the unbiased variance.
    same = {"class": teacher["class"].mean(dim=0, keepdim=True).expand(6, 1, 3)}
    assert float(feature_loss(same, teacher)) == pytest.approx(5 / 6, rel=1e-5)


def test_one_image_or_the_same_image_is_no_division_by_zero():
    student, teacher = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 3.0]]])
    assert float(feature_loss({"class": student}, {"class": teacher})) == pytest.approx(1 / 10)
    twice = teacher.expand(2, 1, 2)
    assert feature_loss({"class": twice}, {"class": twice}) == 0
