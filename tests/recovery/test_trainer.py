"""No zero comes back under SparseTrainer, whatever trains; everything else is the Trainer's own."""

import json
import logging

import pytest
import torch
from support.recovery import (
    assert_same_zeros,
    examples,
    make_trainer,
    sparse_vit,
    tiny_vit,
    zeros,
)
from torch.nn import functional as F
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTForImageClassification,
)

from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.recovery.mask_holder import MaskHolder
from cap_hf.recovery.trainer import model_sparsity
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.targets import find_targets


def make_optimizer(name, model):
    parameters = model.parameters()
    return {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        "adamw": lambda: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5),
        "rmsprop": lambda: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
        "adamax": lambda: torch.optim.Adamax(parameters, lr=0.01),
        "adafactor": lambda: torch.optim.Adafactor(parameters, lr=0.01, weight_decay=0.1),
    }[name]()


@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop", "adamax", "adafactor"])
def test_no_zero_comes_back_under_any_optimizer(tmp_path, name):
    model = sparse_vit()
    before, start = zeros(model), {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(tmp_path, model, optimizers=(make_optimizer(name, model), None)).train()
    assert_same_zeros(model, before)
    assert not torch.equal(model.vit.layers[0].mlp.fc1.weight, start["vit.layers.0.mlp.fc1.weight"])


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


class DropHolder(TrainerCallback):
    """Takes the masks' hooks away, as nothing should."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.masks.detach()


def test_a_violated_mask_is_an_error_at_the_next_save(tmp_path):
    callback = DropHolder()
    trainer = make_trainer(tmp_path, sparse_vit(), save_steps=2)
    callback.trainer = trainer
    trainer.add_callback(callback)
    with pytest.raises(CAPError, match=r"no longer 0 in vit\.layers"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_violated_mask_of_the_average_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, sparse_vit(), ema_decay=0.5)
    trainer.average.update(trainer.model)
    with torch.no_grad():
        trainer.average.model.vit.layers[0].mlp.fc1.weight.fill_(1.0)
    with pytest.raises(CAPError, match="no longer 0"):
        trainer.save_model()


def test_masks_hold_under_a_gradient_scaler_that_skips_steps():
    # fp16 training needs CUDA, its scaler does not: steps with infinite gradients are skipped, others are held.
    model = sparse_vit()
    before = zeros(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    holder, scaler = MaskHolder(model), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    holder.attach(optimizer)
    batch = collate(examples(16))
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(**batch).loss).backward()
        if step == 1:
            model.vit.layers[0].mlp.fc1.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert_same_zeros(model, before)
    assert scaler.get_scale() == 2.0**15


def test_layers_that_are_pruned_away_and_layers_outside_the_encoder_stay_zero(tmp_path):
    model = sparse_vit()
    with torch.no_grad():
        model.vit.layers[0].attention.q_proj.weight.zero_()
        model.classifier.weight[:, ::2] = 0
    make_trainer(tmp_path, model).train()
    assert not model.vit.layers[0].attention.q_proj.weight.any()
    assert not model.classifier.weight[:, ::2].any()
    assert (model.classifier.weight[:, 1::2] != 0).all()


def test_a_new_classifier_of_zeros_is_trained(tmp_path):
    model = sparse_vit()
    torch.nn.init.zeros_(model.classifier.weight)
    make_trainer(tmp_path, model).train()
    assert model.classifier.weight.any()


def test_gradients_of_pruned_weights_do_not_count_in_clipping():
    model = sparse_vit()
    holder = MaskHolder(model)
    holder.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model(**collate(examples(8))).loss.backward()
    for name, zero in zeros(model).items():
        gradient = model.get_submodule(name).weight.grad
        assert not gradient[zero].any()
        assert gradient.any()


def test_momentum_of_newly_pruned_weights_is_forgotten():
    model = tiny_vit()
    holder, optimizer = MaskHolder(model), torch.optim.AdamW(model.parameters())
    holder.attach(optimizer)
    model(**collate(examples(8))).loss.backward()
    optimizer.step()
    weight = model.vit.layers[0].mlp.fc1.weight
    with torch.no_grad():
        weight[0] = 0
    holder.take()
    holder.clear_state(optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.state[weight][name][0].any()
        assert optimizer.state[weight][name][1].any()
    assert optimizer.state[weight]["step"] == 1


def test_resnet_keeps_the_zeros_of_its_convolutions(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(
        depths=[1, 1], hidden_sizes=[8, 16], embedding_size=4, layer_type="basic", num_labels=4, num_channels=1
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight[:, :, ::2] = 0
    before = zeros(model)
    make_trainer(tmp_path, model, data=examples(size=16), ema_decay=0.5, max_steps=3).train()
    assert_same_zeros(model, before)


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


def test_the_average_is_the_result_and_what_is_evaluated(tmp_path):
    weights = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            weights.append(model.classifier.weight.detach().clone())

    model = sparse_vit()
    trainer = make_trainer(tmp_path, model, callbacks=[Record()], ema_decay=0.5, max_steps=4, save_steps=2)
    trainer.train()
    average = weights[0]
    for weight in weights[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(model.classifier.weight.detach(), average)
    with torch.no_grad():
        logits = model.eval()(pixel_values=collate(examples(16))["pixel_values"]).logits
    torch.testing.assert_close(torch.from_numpy(trainer.predict(examples(16)).predictions), logits)


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


def test_gradual_pruning_ends_at_the_schedule(tmp_path):
    model = sparse_vit(0.3)
    before = zeros(model)
    trainer = make_trainer(tmp_path, model, sparsity_schedule="0:0.4,1:0.6,1.5:0.7", max_steps=-1, num_train_epochs=2)
    rates = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler, **kwargs):
            rates.append(lr_scheduler.get_last_lr()[0])

    trainer.add_callback(Record())
    trainer.train()
    steps = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry}
    assert list(steps) == [0, 6, 9]
    assert list(steps.values()) == pytest.approx([0.4, 0.6, 0.7], abs=1e-3)
    assert model_sparsity(model) == pytest.approx(0.7, abs=1e-3)
    for name, zero in zeros(model).items():
        assert (zero | ~before[name]).all(), name
    assert rates[0] == rates[6] == rates[9] == 0.01
    assert rates[5] < rates[4] < rates[3]


def test_another_scheduler_is_used_as_it_is(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_vit(), sparsity_schedule="0.3,0.5,2,linear", lr_scheduler_type="constant", max_steps=4
    )
    trainer.train()
    rates = {entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    assert rates == {0.01}


def test_the_best_checkpoint_is_one_after_the_last_pruning_step(tmp_path):
    model = tiny_vit()
    trainer = make_trainer(
        tmp_path,
        model,
        sparsity_schedule="0.3,0.9,2,linear",
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        ema_decay=0.5,
    )
    trainer.train()
    assert model_sparsity(model) == pytest.approx(0.9, abs=1e-3)
    assert trainer.state.best_global_step > 3


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


def test_pruning_draws_no_random_numbers(tmp_path):
    draws = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                draws.append(torch.get_rng_state())

    for changes in ({}, {"sparsity_schedule": "0.5"}):
        trainer = make_trainer(tmp_path, tiny_vit(), max_steps=1, **changes)
        trainer.add_callback(Record())
        trainer.train()
    assert torch.equal(*draws)


def test_progress_is_logged_where_the_trainer_logs(tmp_path, caplog):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    with caplog.at_level(logging.ERROR):
        trainer = make_trainer(tmp_path, tiny_vit(), callbacks=[Reporter()], sparsity_schedule="0.5", max_steps=2)
        trainer.train()
    assert any("sparsity" in logs for logs in seen)
    assert json.dumps(trainer.state.log_history)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity_schedule": "0.9,0.5,3,linear"}, "goes down"),
        ({"sparsity_schedule": "0:0.9,1:0.5"}, "can only rise"),
        ({"sparsity_schedule": "0.1,0.9,3,cubic"}, "starts at sparsity 0.1, but the model is 60"),
        ({"sparsity_schedule": "0:0.9"}, "in epochs but the run is in --max_steps"),
        ({"sparsity_schedule": "0.65,0.9,20,cubic"}, "twice at optimizer step"),
        ({"augmentation": "mighty"}, "none, light, medium, heavy"),
        ({"ema_decay": 1.0}, "not between 0 and 1"),
        ({"cycle_peak_decay": 0.0}, r"not in \(0, 1\]"),
        ({"distillation_temperature": 0.0}, "greater than 0"),
        ({"hidden_state_weight": -1.0}, "0 or greater"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, changes, message):
    with pytest.raises(CAPError, match=message) as caught:
        make_trainer(tmp_path, sparse_vit(), **changes).train()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works there")
def test_fp16_without_cuda_is_one_line(tmp_path):
    with pytest.raises(CAPError, match="fp16 scales its gradients on a CUDA device"):
        SparseTrainingArguments(output_dir=str(tmp_path), fp16=True)


def test_a_schedule_needs_something_that_prunes(tmp_path):
    from cap_hf.recovery.trainer import SparseTrainer

    args = SparseTrainingArguments(output_dir=str(tmp_path), sparsity_schedule="0.5", use_cpu=True)
    with pytest.raises(CAPError, match="prune=GradualPruner"):
        SparseTrainer(tiny_vit(), args, train_dataset=examples())
    with pytest.raises(CAPError, match="SparseTrainingArguments"):
        SparseTrainer(tiny_vit(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
