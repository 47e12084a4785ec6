"""Learning from a teacher: the sum of the losses, and teachers that do not fit."""

import pytest
import torch
from support.recovery import examples, image_processor, make_trainer, sparse_vit, tiny_vit
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.recovery.distillation import Teacher, check_labels, check_outputs, check_pixels, check_returns
from cap_hf.recovery.losses import hidden_state_loss, logit_loss
from cap_hf.recovery.trainer import SparseTrainer


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
    teacher = Teacher(model, torch.device("cpu"), bf16=True)
    logits, states = teacher(pixels, hidden_states=True)
    assert teacher.model.dtype == torch.bfloat16
    # Who evaluates the teacher evaluates it as it was loaded.
    assert model.dtype == torch.float32
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


def test_a_teachers_error_without_a_message_is_named_by_its_kind():
    class Speechless(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, pixel_values, output_hidden_states):
            raise NotImplementedError

    teacher = Teacher(tiny_vit(1), torch.device("cpu"))
    teacher.model = Speechless()
    with pytest.raises(CAPError, match="the teacher cannot take the student's images: .*: NotImplementedError$"):
        check_outputs(tiny_vit(), teacher, examples(1)[0]["pixel_values"][None], False)


def test_a_check_takes_the_images_to_where_and_what_each_model_is():
    student = tiny_vit().to(torch.float64)
    teacher = Teacher(tiny_vit(1), torch.device("cpu"), bf16=True)
    check_outputs(student, teacher, examples(1)[0]["pixel_values"][None], True)


def test_another_normalisation_is_one_line():
    own, other = image_processor(), image_processor()
    check_pixels(own, other)
    other.image_mean = [0.1]
    with pytest.raises(CAPError, match=r"normalises images to mean and std \(\[0\.1\], \[0\.5\]\), the student to"):
        check_pixels(own, other)


def test_tuples_are_refused_in_one_line(tmp_path):
    """Half of transformers' own models fail on them, the others would be read by guessing positions."""
    tuples = tiny_vit(1)
    tuples.config.return_dict = False
    with pytest.raises(CAPError, match=r"return_dict is false in the teacher's config.*return_dict = True"):
        make_trainer(tmp_path, sparse_vit(), teacher=tuples)
    with pytest.raises(CAPError, match="return_dict is false in the model's config") as caught:
        make_trainer(tmp_path, tuples)
    assert "\n" not in str(caught.value)
    check_returns(tiny_vit(), "model")


def test_a_teacher_that_is_the_student_is_one_line(tmp_path):
    model = sparse_vit()
    with pytest.raises(CAPError, match="the teacher is the model itself"):
        make_trainer(tmp_path, model, teacher=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_pixels_may_be_made_by_the_collator(tmp_path):
    raw = [{"image": item["pixel_values"], "labels": item["labels"]} for item in examples(24)]

    def collate_raw(items):
        return collate([{"pixel_values": item["image"], "labels": item["labels"]} for item in items])

    args = make_trainer(tmp_path, sparse_vit(), max_steps=1, remove_unused_columns=False).args
    SparseTrainer(sparse_vit(), args, teacher=tiny_vit(1), train_dataset=raw, data_collator=collate_raw).train()
