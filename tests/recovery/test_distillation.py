"""Distillation: each loss against its definition, the teacher's checks."""

import pytest
import torch
from support.recovery import examples, make_trainer, sparse_vit, tiny_vit
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.recovery.distillation import Teacher, check_labels, hidden_state_loss, logit_loss


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


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    student, teacher = sparse_vit(), tiny_vit(1)
    trainer = make_trainer(
        tmp_path,
        student,
        teacher=teacher,
        hard_label_weight=0.3,
        distillation_weight=0.7,
        hidden_state_weight=1.9,
        label_smoothing_factor=0.1,
    )
    batch = collate(examples(8))
    student.train()
    loss, outputs = trainer.compute_loss(student, batch, return_outputs=True)
    with torch.no_grad():
        own, other = (
            model(pixel_values=batch["pixel_values"], output_hidden_states=True) for model in (student, teacher)
        )
    hard = F.cross_entropy(own.logits, batch["labels"], label_smoothing=0.1)
    soft, states = logit_loss(own.logits, other.logits, 2.0), hidden_state_loss(own.hidden_states, other.hidden_states)
    torch.testing.assert_close(loss.detach(), 0.3 * hard + 0.7 * soft + 1.9 * states)
    torch.testing.assert_close(outputs["logits"].detach(), own.logits)
    # Evaluation measures the labels alone.
    student.eval()
    evaluated = trainer.compute_loss(student, collate(examples(8)))
    assert float(evaluated.detach()) != pytest.approx(float(loss.detach()))


def test_the_student_comes_closer_to_its_teacher(tmp_path):
    student, teacher = sparse_vit(), tiny_vit(1)
    pixels = collate(examples(16))["pixel_values"]

    def distance():
        with torch.no_grad():
            return float(logit_loss(student.eval()(pixel_values=pixels).logits, teacher(pixel_values=pixels).logits, 1))

    before = distance()
    make_trainer(
        tmp_path, student, teacher=teacher, hard_label_weight=0.0, distillation_weight=1.0, max_steps=20
    ).train()
    assert distance() < before / 2


def test_a_teacher_in_bfloat16_answers_in_float32():
    model = tiny_vit(1)
    pixels = collate(examples(8))["pixel_values"]
    with torch.no_grad():
        expected = model.eval()(pixel_values=pixels).logits
    logits, states = Teacher(model, torch.device("cpu"), bf16=True)(pixels, hidden_states=True)
    assert model.dtype == torch.bfloat16
    assert {logits.dtype, *(state.dtype for state in states)} == {torch.float32}
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.1)
    assert not logits.requires_grad


def test_labels_must_be_the_students():
    student = tiny_vit().config
    fewer, named, renamed = tiny_vit(num_labels=3).config, tiny_vit().config, tiny_vit().config
    with pytest.raises(CAPError, match="the teacher has 3 labels, the student 4"):
        check_labels(student, fewer)
    named.id2label = dict(enumerate("abcd"))
    renamed.id2label = dict(enumerate("abdc"))
    check_labels(student, named)
    with pytest.raises(CAPError, match="label 2 is 'd' for the teacher and 'c' for the student"):
        check_labels(named, renamed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"hidden state 0 is \(5, 32\) in the teacher and \(5, 16\) in the student"),
        ({"num_hidden_layers": 3}, "the teacher has 4 hidden states, the student 3"),
        ({"image_size": 16}, "the teacher cannot take the student's images"),
        ({"num_labels": 5}, "the teacher has 5 labels"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line(tmp_path, changes, message):
    with pytest.raises(CAPError, match=message) as caught:
        make_trainer(tmp_path, sparse_vit(), teacher=tiny_vit(1, **changes), hidden_state_weight=1.0)
    assert "\n" not in str(caught.value)


def test_another_width_is_fine_for_logits(tmp_path):
    make_trainer(tmp_path, sparse_vit(), teacher=tiny_vit(1, hidden_size=32), max_steps=1).train()


def test_a_convolutional_teacher_for_logits(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=4, num_labels=4, num_channels=1)
    teacher = ResNetForImageClassification(config)
    statistics = {name: value.clone() for name, value in teacher.named_buffers()}
    make_trainer(tmp_path, sparse_vit(), teacher=teacher, max_steps=2).train()
    for name, value in teacher.named_buffers():
        assert torch.equal(value, statistics[name]), name
