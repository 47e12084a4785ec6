"""Under SparseTrainer zeros hold with any option, losses are what they say, and the rest is the Trainer's own."""

import errno
import math

import pytest
import torch
from support.recovery import assert_same_zeros, examples, make_trainer, sparse_vit, tiny_vit, zeros
from torch.nn import functional as F
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.recovery.losses import NO_LABEL, logit_loss
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.targets import find_targets


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}])
def test_what_is_saved_has_positive_zeros(tmp_path, changes):
    """Also of a model whose mask was multiplied on, with a -0.0 where a weight was negative."""
    model = sparse_vit()
    for target in find_targets(model):
        target.weight.data.copy_(torch.where(target.weight == 0, -0.0, target.weight))
    trainer = make_trainer(tmp_path, model, **changes)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for target in find_targets(ViTForImageClassification.from_pretrained(tmp_path / "saved")):
        removed = target.weight == 0
        assert removed.any()
        assert not torch.signbit(target.weight[removed]).any(), target.name


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"ema_decay": 0.5},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"optim": "adafactor", "weight_decay": 0.5},
        {"augmentation": "heavy", "label_smoothing_factor": 0.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_zero_comes_back_with_any_option(tmp_path, changes):
    model = sparse_vit()
    before = zeros(model)
    make_trainer(tmp_path, model, save_steps=3, **changes).train()
    assert_same_zeros(model, before)
    assert_same_zeros(ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-3"), before)


def test_a_dense_model_trains_as_under_the_plain_trainer(tmp_path):
    own, other = tiny_vit(), tiny_vit()
    trainer = make_trainer(tmp_path / "own", own, max_steps=4)
    trainer.train()
    plain = TrainingArguments(
        **{
            name: getattr(trainer.args, name)
            for name in ("max_steps", "per_device_train_batch_size", "learning_rate", "use_cpu")
        },
        output_dir=str(tmp_path / "plain"),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(other, plain, train_dataset=examples(), data_collator=collate).train()
    for (name, mine), theirs in zip(own.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_accumulated_batches_are_one_batch(tmp_path):
    models = []
    for accumulation, batch in ((1, 16), (4, 4)):
        model = sparse_vit()
        make_trainer(
            tmp_path,
            model,
            teacher=tiny_vit(1),
            max_steps=2,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch,
            optim="sgd",
        ).train()
        models.append(model)
    for (name, mine), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_another_scheduler_is_used_as_it_is(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_vit(), sparsity_schedule="0.3,0.5,2,linear", lr_scheduler_type="constant", max_steps=4
    )
    trainer.train()
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert rates == {0.01}


def test_the_distillation_token_learns_from_the_teacher(tmp_path):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2}
    config = DeiTConfig(**sizes, num_attention_heads=2, intermediate_size=32, num_labels=4, hidden_dropout_prob=0.0)
    model, teacher = DeiTForImageClassificationWithTeacher(config), tiny_vit(1)
    trainer = make_trainer(tmp_path, model, teacher=teacher, distillation_weight=2.0, distillation_temperature=3.0)
    batch = collate(examples(8))
    model.train()
    loss = trainer.compute_loss(model, batch)
    with torch.no_grad():
        own, target = model(pixel_values=batch["pixel_values"]), teacher(pixel_values=batch["pixel_values"]).logits
    hard = F.cross_entropy(own.cls_logits, batch["labels"])
    p = (target / 3).softmax(-1)
    soft = 9 * (p * (p.log() - (own.distillation_logits / 3).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss.detach(), hard + 2 * soft)
    # Where no head learns labels, both together learn from the teacher.
    trainer.args.hard_label_weight = 0.0
    soft = 9 * (p * (p.log() - (own.logits / 3).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(trainer.compute_loss(model, batch).detach(), 2 * soft)
    trainer.args.hard_label_weight = 1.0
    trainer.train()
    # Its class takes no labels: the plain Trainer would evaluate no loss.
    metrics = trainer.evaluate()
    expected = F.cross_entropy(
        torch.from_numpy(trainer.predict(examples(16)).predictions), collate(examples(16))["labels"]
    )
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_the_teacher_is_frozen_and_never_saved(tmp_path):
    teacher = tiny_vit(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = make_trainer(
        tmp_path, sparse_vit(), teacher=teacher, hidden_state_weight=1.0, teacher_bf16=False, save_steps=3
    )
    trainer.train()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint-3").glob("*.safetensors")]
    assert len(sizes) == 1
    weights = sum(parameter.numel() * 4 for parameter in trainer.model.parameters())
    assert sizes[0] < 1.5 * weights + 10_000


def unlabelled(count=48, share=0.5):
    """The examples, the first of them without a label."""
    data = examples(count)
    for item in data[: round(share * count)]:
        item["labels"] = torch.tensor(NO_LABEL)
    return data


def test_examples_without_a_label_learn_from_the_teacher_alone(tmp_path):
    student, teacher = sparse_vit(), tiny_vit(1)
    data = unlabelled(8)
    trainer = make_trainer(tmp_path, student, teacher=teacher, data=data, hard_label_weight=0.3)
    loss = trainer.compute_loss(student.train(), collate(data))
    with torch.no_grad():
        own, other = (model(pixel_values=collate(data)["pixel_values"]).logits for model in (student, teacher))
    hard = F.cross_entropy(own[4:], collate(data)["labels"][4:])
    torch.testing.assert_close(loss.detach(), 0.3 * hard + logit_loss(own, other, 2.0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"teacher": True}, {"augmentation": "heavy"}, {"teacher": True, "augmentation": "medium"}],
    ids=["labels", "teacher", "augmentation", "both"],
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_labels_of_minus_100_leave_weights_and_evaluation_finite(tmp_path, changes, share):
    """Nine in ten leave whole batches without a label."""
    torch.manual_seed(0)
    model = sparse_vit()
    teacher = tiny_vit(1) if changes.get("teacher") else None
    options = {name: value for name, value in changes.items() if name != "teacher"}
    trainer = make_trainer(tmp_path, model, data=unlabelled(share=share), teacher=teacher, **options)
    before = model.classifier.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.classifier.weight, before)
    # Of a batch without a label too, where the model's own loss is 0 / 0.
    assert math.isfinite(trainer.evaluate(unlabelled(16, share=1.0))["eval_loss"])


def test_what_the_losses_are_not_made_for_is_one_line(tmp_path):
    with pytest.raises(CAPError, match="one label of several, .* is for multi_label_classification"):
        make_trainer(
            tmp_path,
            sparse_vit(problem_type="multi_label_classification"),
            teacher=tiny_vit(1, problem_type="multi_label_classification"),
        )
    with pytest.raises(CAPError, match="ViTForImageClassification is for regression"):
        make_trainer(tmp_path, sparse_vit(num_labels=1), augmentation="light")
    args = SparseTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(CAPError, match="compute_loss_func"):
        SparseTrainer(sparse_vit(), args, teacher=tiny_vit(1), compute_loss_func=lambda *_, **__: 0)
    SparseTrainer(sparse_vit(), args, compute_loss_func=lambda *_, **__: 0)


def test_a_model_that_diverged_is_never_saved(tmp_path):
    trainer = make_trainer(tmp_path, sparse_vit(), learning_rate=1e38, optim="sgd", max_grad_norm=0.0, save_steps=4)
    with pytest.raises(CAPError, match=r"training diverged: .* is no longer finite; lower --learning_rate") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("where", ["_save", "training_step"])
def test_only_what_is_saved_can_fill_the_disk_of_the_folder(tmp_path, monkeypatch, where):
    """Training itself fills other disks, such as that of shared memory: then the system's own words stay."""
    trainer = make_trainer(tmp_path, sparse_vit(), save_steps=1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, where, full)
    with pytest.raises((OSError, CAPError)) as caught:
        trainer.train()
    assert isinstance(caught.value, CAPError) == (where == "_save")
    assert where != "_save" or f"the disk of {tmp_path} is full" in str(caught.value)


def test_a_trainer_may_evaluate_alone(tmp_path):
    model = sparse_vit()
    args = make_trainer(tmp_path, sparse_vit(), sparsity_schedule=None).args
    trainer = SparseTrainer(model, args, teacher=tiny_vit(1), eval_dataset=examples(16), data_collator=collate)
    with torch.no_grad():
        expected = float(model.eval()(**collate(examples(16))).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
