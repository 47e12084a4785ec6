"""Models without a head under SparseTrainer: zeros held, what is no tower untouched, the rest as with labels."""

import pytest
import torch
from support.backbones import tiny_clip, tiny_convnext, tiny_dinov2, tiny_mae
from support.recovery import assert_same_zeros, image_processor, images, make_trainer, sparse, zeros
from transformers import AutoModel, CLIPModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTModel

from cap_hf.errors import CAPError
from cap_hf.recovery.augmentation import PRESETS, BatchAugmentation
from cap_hf.recovery.losses import feature_loss
from cap_hf.recovery.mask_holder import model_sparsity
from cap_hf.recovery.tower import Tower

FAMILIES = {"dinov2": (tiny_dinov2, 8), "convnext": (tiny_convnext, 32), "clip": (tiny_clip, 8), "mae": (tiny_mae, 8)}
TOWERS = {"clip": "vision_model.", "mae": "vit."}


def missed(student, teacher, data):
    """The share of the teacher's features that the student misses."""
    pixels = {"pixel_values": torch.stack([each["pixel_values"] for each in data])}
    with torch.no_grad():
        return float(feature_loss(*(Tower(model.eval()).features(pixels)[0] for model in (student, teacher))))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, changes) for name in FAMILIES for changes in ({}, {"ema_decay": 0.9, "weight_decay": 0.5})),
        *((name, {"bf16": True}) for name in FAMILIES),
        # transformers has none of ConvNeXt.
        *((name, {"gradient_checkpointing": True}) for name in ("dinov2", "clip", "mae")),
    ],
)
def test_it_comes_closer_to_its_teacher_with_its_zeros_and_nothing_else_moves(tmp_path, name, changes):
    make, size = FAMILIES[name]
    student, teacher, data = sparse(make()), make(), images(48, size)
    expected, before = zeros(student), {key: value.clone() for key, value in student.state_dict().items()}
    far = missed(student, teacher, data)
    trainer = make_trainer(
        tmp_path, student, data=data, teacher=teacher, max_steps=24, learning_rate=3e-3, save_steps=24, **changes
    )
    trainer.train()
    near = missed(student, teacher, data)
    assert near < 0.7 * far
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(near, rel=0.5)
    assert_same_zeros(student, expected)
    others = [key for key in before if not key.startswith(TOWERS.get(name, ""))]
    assert bool(others) == (name in TOWERS)
    assert all(torch.equal(student.state_dict()[key], before[key]) for key in others)
    assert all(each.requires_grad for each in student.parameters() if each.is_floating_point()) or name == "mae"
    # What is saved is the whole, of its own class.
    saved, info = type(student).from_pretrained(tmp_path / "checkpoint-24", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(torch.equal(saved.state_dict()[key], before[key]) for key in others)
    assert_same_zeros(saved, expected)


def test_evaluation_while_it_trains_chooses_the_best(tmp_path):
    student, teacher, data = sparse(tiny_clip()), tiny_clip(), images()
    trainer = make_trainer(
        tmp_path,
        student,
        data=data,
        teacher=teacher,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        max_steps=6,
        learning_rate=0.3,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert list(losses) == [2, 4, 6]
    assert trainer.state.best_metric == min(losses.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), rel=1e-4)
    assert losses[2] != losses[6]
    found = trainer.predict(data[:16])
    assert [each.shape for each in found.predictions] == [(16, 1, 16), (16, 4, 16), (16, 1, 8)]


@pytest.mark.parametrize("make", [tiny_dinov2, tiny_clip])
def test_a_run_that_is_resumed_ends_as_it_would_have(tmp_path, make):
    changes = {"max_steps": 6, "save_steps": 3, "ema_decay": 0.8, "augmentation": "medium", "learning_rate": 3e-3}
    models = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        student = sparse(make())
        trainer = make_trainer(tmp_path, student, data=images(), teacher=make(), **changes)
        trainer.train(resume_from_checkpoint=resume)
        models.append(student.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("make", [tiny_dinov2, tiny_clip])
def test_it_is_pruned_while_it_trains(tmp_path, make):
    student = make()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = make_trainer(
        tmp_path, student, data=images(), teacher=make(), sparsity_schedule="0.3,0.6,2,linear", max_steps=4
    )
    trainer.train()
    assert model_sparsity(student) == pytest.approx(0.6, abs=1e-2)
    rest = [name for name in before if name.startswith("text_model.")]
    assert bool(rest) == isinstance(student, CLIPModel)
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in rest)


def test_student_and_teacher_see_the_same_augmented_images(tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path, sparse(tiny_dinov2()), data=images(), teacher=tiny_dinov2(), augmentation="heavy", max_steps=1
    )
    seen = []
    features = Tower.features

    def watched(self, batch, *args, **kwargs):
        seen.append(batch["pixel_values"])
        return features(self, batch, *args, **kwargs)

    monkeypatch.setattr(Tower, "features", watched)
    trainer.train()
    own, other = seen
    assert torch.equal(own, other)
    originals = [each["pixel_values"] for each in images()]
    assert not any(torch.equal(image, each) for image in own for each in originals)


@pytest.mark.parametrize("labels", [None, torch.tensor([7, 900, 3, 1])])
def test_images_without_classes_are_never_mixed(labels):
    torch.manual_seed(0)
    preset = PRESETS["none"].__class__(mixup=1.0)
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8) / 4 - 0.5
    found, shares = BatchAugmentation(preset, image_processor(), 0)(pixels, labels)
    assert shares is None
    torch.testing.assert_close(found, pixels.clone())


def test_a_backbone_without_a_pooler_is_resumed_without_one(tmp_path):
    config = tiny_vit_config()
    for resume in (None, "last"):
        student = ViTModel(config, add_pooling_layer=False)
        teacher = ViTModel(config, add_pooling_layer=False)
        trainer = make_trainer(tmp_path, student, data=images(), teacher=teacher, max_steps=2, save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
    assert AutoModel.from_pretrained(tmp_path / "checkpoint-2", add_pooling_layer=False).pooler is None


def test_registers_are_trained_along(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    student, teacher = (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes)) for _ in range(2))
    before = student.embeddings.register_tokens.clone()
    trainer = make_trainer(tmp_path, student, data=images(), teacher=teacher, max_steps=2)
    trainer.train()
    assert not torch.equal(student.embeddings.register_tokens, before)
    assert trainer.predict(images(16)).predictions[1].shape == (16, 4, 16)


def test_diverging_is_one_line(tmp_path):
    trainer = make_trainer(
        tmp_path, sparse(tiny_dinov2()), data=images(), teacher=tiny_dinov2(), learning_rate=1e38, max_grad_norm=0.0
    )
    with pytest.raises(CAPError, match="training diverged: "):
        trainer.train()


def tiny_vit_config():
    """The config of a ViT for images in colour."""
    from support.recovery import tiny_vit

    return tiny_vit(num_channels=3).config
