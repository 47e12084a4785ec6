"""What a model learns: each loss against its formula, written out, and what does not fit in one line."""

import pytest
import torch
from support.backbones import tiny_clip, tiny_convnext, tiny_dinov2, tiny_mae
from support.recovery import examples, images, make_trainer, sparse, sparse_vit, tiny_vit
from torch.nn import functional as F
from transformers import (
    CLIPVisionModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTModel,
)

from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.recovery.losses import hidden_state_loss, logit_loss
from cap_hf.towers import see

FAMILIES = {"dinov2": (tiny_dinov2, 8), "convnext": (tiny_convnext, 32), "clip": (tiny_clip, 8), "mae": (tiny_mae, 8)}


def parts(name, outputs):
    """The features of a family, without `features_of`."""
    tokens = outputs.last_hidden_state
    if name == "convnext":
        return {"patch": tokens.flatten(2).mT, "pooled": outputs.pooler_output[:, None]}
    found = {"class": tokens[:, :1], "patch": tokens[:, 1:]}
    return found if name == "mae" else found | {"pooled": outputs.pooler_output[:, None]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_a_step_is_that_of_features_and_hidden_states(tmp_path, name):
    make, size = FAMILIES[name]
    student, teacher, data = sparse(make()), make(), images(8, size)
    trainer = make_trainer(tmp_path, student, data=data, teacher=teacher, feature_weight=0.7, hidden_state_weight=1.9)
    batch = collate(data)
    loss, outputs = trainer.compute_loss(student.train(), batch, return_outputs=True)
    with torch.no_grad():
        own, other = (see(model, batch, output_hidden_states=True) for model in (student, teacher))
    missed = []
    for part, target in parts(name, other).items():
        error = (parts(name, own)[part] - target).square().sum()
        spread = (target - target.mean(dim=(0, 1))).square().sum()
        count = target.shape[0] * target.shape[1]
        missed.append(error / spread * (count - 1) / count)
        torch.testing.assert_close(outputs[part].detach(), parts(name, own)[part])
    features, states = torch.stack(missed).mean(), hidden_state_loss(own.hidden_states, other.hidden_states)
    assert features > 0.01
    torch.testing.assert_close(loss.detach(), 0.7 * features + 1.9 * states)
    # Evaluation measures the features alone.
    torch.testing.assert_close(trainer.compute_loss(student.eval(), batch).detach(), features)


@pytest.mark.parametrize("name", ["clip", "mae"])
def test_gradients_reach_the_tower_alone(tmp_path, name):
    student, teacher = sparse(FAMILIES[name][0]()), FAMILIES[name][0]()
    trainer = make_trainer(tmp_path, student, data=images(), teacher=teacher)
    with trainer.objective.student.trained():
        trainer.compute_loss(student.train(), collate(images(8))).backward()
    prefix = {"clip": "vision_model.", "mae": "vit."}[name]
    reached = {each for each, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached
    assert all(each.startswith(prefix) for each in reached)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_labels_say_nothing_to_a_model_without_a_head(tmp_path):
    student = sparse(tiny_dinov2())
    trainer = make_trainer(tmp_path, student, data=images(), teacher=tiny_dinov2())
    batch = collate(images(8))
    expected = trainer.compute_loss(student.train(), batch)
    assert torch.equal(trainer.compute_loss(student, batch | {"labels": torch.arange(8) + 500}), expected)


def test_hidden_states_count_as_much_as_features_unless_said_otherwise(tmp_path):
    weights = []
    for changes in ({}, {"hidden_state_weight": 0.0}, {"hidden_state_weight": 3.0}):
        trainer = make_trainer(tmp_path, sparse(tiny_dinov2()), data=images(), teacher=tiny_dinov2(), **changes)
        weights.append(trainer.objective.hidden_state_weight)
    assert weights == [1.0, 0.0, 3.0]
    assert not make_trainer(tmp_path, sparse_vit(), teacher=tiny_vit(1)).args.hidden_state_weight


def test_a_classifier_teaches_what_lies_under_its_head(tmp_path):
    dense = tiny_dinov2()
    classifier = Dinov2ForImageClassification(dense.config)
    classifier.base_model.load_state_dict(dense.state_dict())
    losses = []
    for teacher in (dense, classifier):
        student = sparse(tiny_dinov2())
        trainer = make_trainer(tmp_path, student, data=images(), teacher=teacher)
        losses.append(trainer.compute_loss(student.train(), collate(images(8))))
    assert torch.equal(*losses)


def test_the_vision_tower_alone_learns_what_it_has_in_common_with_the_whole(tmp_path):
    """The whole pools into a projection of other width: that is said, and not passed over."""
    whole = tiny_clip()
    student = CLIPVisionModel(whole.config.vision_config)
    with pytest.raises(CAPError, match=r"pooled features are \(1, 8\) in the teacher and \(1, 16\) in the student"):
        make_trainer(tmp_path, student, data=images(), teacher=whole)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        (None, {}, "Dinov2Model has no head to learn labels with: name a teacher, whose features it learns"),
        ({}, {"feature_weight": 0.0, "hidden_state_weight": 0.0}, "feature_weight and hidden_state_weight are 0, and"),
        ({"hidden_size": 32}, {}, r"class features are \(1, 32\) in the teacher and \(1, 16\) in the student: choose"),
        ({"num_hidden_layers": 3}, {}, "the teacher has 4 hidden states, the student 3: set --hidden_state_weight 0"),
        ({"num_channels": 1}, {}, "the teacher cannot take the student's images: "),
    ],
)
def test_what_a_backbone_cannot_learn_from_is_one_line(tmp_path, teacher, changes, message):
    made = None if teacher is None else tiny_dinov2(**teacher)
    with pytest.raises(CAPError, match=message) as caught:
        make_trainer(tmp_path, sparse(tiny_dinov2()), data=images(), teacher=made, **changes)
    assert "\n" not in str(caught.value)


def test_a_part_that_the_teacher_lacks_is_one_line(tmp_path):
    config = tiny_vit(num_channels=3).config
    with pytest.raises(CAPError, match="the teacher gives class and patch features, and none to learn pooled from"):
        make_trainer(tmp_path, ViTModel(config), data=images(), teacher=ViTModel(config, add_pooling_layer=False))


def test_a_teacher_of_another_depth_will_do_for_features(tmp_path):
    student = sparse(tiny_dinov2())
    teacher = tiny_dinov2(num_hidden_layers=3)
    make_trainer(tmp_path, student, data=images(), teacher=teacher, hidden_state_weight=0.0, max_steps=1).train()


def test_a_model_with_labels_of_another_kind_keeps_its_own_loss(tmp_path):
    torch.manual_seed(0)
    sizes = {"depths": [1, 1], "hidden_sizes": [8, 8], "num_attention_heads": [1, 1], "num_encoder_blocks": 2}
    sizes |= {"sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=3))
    data = [each | {"labels": torch.randint(3, (16, 16))} for each in images(8, 16)]
    trainer = make_trainer(tmp_path, model.eval(), data=data)
    with torch.no_grad():
        expected = model(**collate(data)).loss
    torch.testing.assert_close(trainer.compute_loss(model, collate(data)).detach(), expected)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("missing", ["absent", -100])
def test_a_classifier_learns_from_its_teacher_alone_where_nothing_has_labels(tmp_path, missing):
    data = [{"pixel_values": each["pixel_values"]} for each in examples()]
    if missing == -100:
        data = [each | {"labels": torch.tensor(-100)} for each in data]
    student, teacher = sparse_vit(), tiny_vit(1)
    trainer = make_trainer(tmp_path, student, teacher=teacher, data=data, distillation_weight=0.7, max_steps=20)
    batch = collate(data[:8])
    loss = trainer.compute_loss(student.train(), batch)
    with torch.no_grad():
        own, other = (model(pixel_values=batch["pixel_values"]).logits for model in (student, teacher))
    torch.testing.assert_close(loss.detach(), 0.7 * logit_loss(own, other, 2.0))
    trainer.train()
    with torch.no_grad():
        own = student(pixel_values=batch["pixel_values"]).logits
    assert logit_loss(own, other, 2.0) < loss / 0.7 / 2


def test_evaluation_of_images_alone_measures_the_divergence(tmp_path):
    data = [{"pixel_values": each["pixel_values"]} for each in examples(16)]
    student, teacher = sparse_vit(), tiny_vit(1)
    trainer = make_trainer(tmp_path, student, teacher=teacher, data=data)
    with torch.no_grad():
        own, other = (model.eval()(pixel_values=collate(data)["pixel_values"]).logits for model in (student, teacher))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(logit_loss(own, other, 2.0)), rel=1e-4)
    # With labels it is the cross entropy, whatever the Trainer was evaluated on before.
    expected = float(F.cross_entropy(own, collate(examples(16))["labels"]))
    assert trainer.evaluate(examples(16))["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("augmentation", ["none", "light"])
def test_images_without_labels_and_without_a_teacher_are_one_line(tmp_path, augmentation):
    data = [{"pixel_values": each["pixel_values"]} for each in examples()]
    trainer = make_trainer(tmp_path, sparse_vit(), data=data, augmentation=augmentation)
    with pytest.raises(CAPError, match="a batch has no labels and there is no teacher"):
        trainer.train()


def test_a_backbone_without_hidden_states_learns_features_alone(tmp_path, caplog):
    """What nobody asked for is left out; what was asked for and is not there is one line."""

    class Silent(Dinov2Model):
        def forward(self, pixel_values, output_hidden_states=False):
            outputs = super().forward(pixel_values)
            outputs.hidden_states = None
            return outputs

    def student():
        return Silent(tiny_dinov2().config)

    trainer = make_trainer(tmp_path, student(), data=images(), teacher=tiny_dinov2(), max_steps=1)
    assert "Silent gives no hidden states: it learns the features alone." in caplog.text
    loss, batch = trainer.compute_loss(trainer.model.train(), collate(images(8))), collate(images(8))
    torch.testing.assert_close(loss.detach(), trainer.compute_loss(trainer.model.eval(), batch).detach())
    with pytest.raises(CAPError, match="Silent has no hidden states to match: set --hidden_state_weight 0"):
        make_trainer(tmp_path, student(), data=images(), teacher=tiny_dinov2(), hidden_state_weight=1.0)
