"""Healing: nearer to the dense model, with its zeros, from images alone, the same each time, with nothing left over."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from support.backbones import tiny_clip, tiny_dinov2
from support.recovery import assert_same_zeros, images, sparse, tiny_vit, zeros
from torch.nn import functional as F

from cap_hf import CAPError
from cap_hf.recovery.healing import check_healing, heal, make_trainer
from cap_hf.recovery.presets import HEAL
from cap_hf.targets import find_targets

QUICK = {"steps": 24, "batch_size": 16, "learning_rate": 3e-3, "disable_tqdm": True}
MAKERS = {"vit": lambda: tiny_vit(num_channels=3).eval(), "dinov2": tiny_dinov2, "clip": tiny_clip}


def distance(model, teacher):
    """What healing brings down, of all images, hidden states 50 times: written out without the code that trains."""
    pixels = torch.stack([each["pixel_values"] for each in images()])
    with torch.no_grad():
        own, other = (each.eval()(pixel_values=pixels, output_hidden_states=True) for each in (model, teacher))
    total = sum(
        float((mine - dense).square().mean() / dense.square().mean())
        for mine, dense in zip(own.hidden_states, other.hidden_states, strict=True)
    ) / len(other.hidden_states)
    p, q = other.logits.softmax(-1), own.logits.softmax(-1)
    return 50 * total + float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("name", MAKERS)
def test_it_comes_nearer_to_the_dense_model_with_exactly_its_zeros(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    teacher = MAKERS[name]()
    dense = {key: value.clone() for key, value in teacher.state_dict().items()}
    model = sparse(copy.deepcopy(teacher), 0.6)
    before, expected = copy.deepcopy(model), zeros(model)
    report = heal(model, teacher, images(), **QUICK)
    assert_same_zeros(model, expected)
    assert report.loss_end < 0.6 * report.loss_start
    assert (report.steps, report.images, report.batch_size, report.learning_rate) == (24, 48, 16, 3e-3)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    if name == "vit":
        near, far = distance(model, teacher), distance(before, teacher)
        assert near < 0.6 * far
        # Means over batches of nearly the same images.
        assert report.loss_start == pytest.approx(far, rel=0.3)
        assert "vit.layers.0.layernorm_before.bias" in changed
        assert all(key.startswith("vit.layers.") for key in changed)
    if name == "clip":
        assert all(key.startswith("vision_model.") for key in changed)
    assert not model.training
    assert "forward" not in model.__dict__
    assert all(torch.equal(value, dense[key]) for key, value in teacher.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_weights_and_labels_say_nothing():
    found = []
    labelled = [each | {"labels": torch.tensor(index % 4)} for index, each in enumerate(images())]
    for seed, data in ((1, images()), (1, labelled), (2, images())):
        teacher = MAKERS["vit"]()
        model = sparse(copy.deepcopy(teacher), 0.6)
        # More than an epoch, whose last batch is smaller.
        heal(model, teacher, data, 4, 20, 1e-3, seed=seed, disable_tqdm=True)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, found[2][name]) for name, value in found[0].items())


def test_fewer_images_than_a_batch_are_enough_and_mixed_precision_is_not_left_on_the_model(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    teacher = MAKERS["dinov2"]()
    model = sparse(copy.deepcopy(teacher))
    assert heal(model, teacher, images(3), 2, 16, disable_tqdm=True).images == 3
    AcceleratorState._reset_state(reset_partial_state=True)
    found = model(pixel_values=images(1)[0]["pixel_values"][None]).last_hidden_state
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    assert "forward" not in model.__dict__


def test_bfloat16_computes_in_it_and_leaves_weights_that_it_has_not(monkeypatch):
    monkeypatch.setattr("cap_hf.recovery.precision.bfloat16_ratio", lambda: 1.0)
    found, dtypes = [], set()
    for bf16 in (False, True):
        teacher = MAKERS["vit"]()
        model = sparse(copy.deepcopy(teacher))
        layer = find_targets(model)[0].module
        layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
        report = heal(model, teacher, images(), 2, 16, bf16=bf16, disable_tqdm=True)
        assert report.to_dict()["bf16"] is bf16
        assert (torch.bfloat16 in dtypes) is bf16
        dtypes.clear()
        found.append(layer.weight.detach())
    AcceleratorState._reset_state(reset_partial_state=True)
    plain, mixed = found
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, mixed.bfloat16().float())
    assert not torch.equal(mixed, plain)
    assert (mixed - plain).norm() < 0.01 * plain.norm()


def test_the_trainer_is_told_the_numbers_of_the_preset(tmp_path):
    teacher = MAKERS["vit"]()
    args = make_trainer(sparse(copy.deepcopy(teacher)), teacher, images(), str(tmp_path)).args
    own = {"logging_steps"}
    assert {name: getattr(args, name) for name in HEAL.keys() - own} == {
        name: value for name, value in HEAL.items() if name not in own
    }


def test_a_classifier_that_gives_no_hidden_states_learns_logits_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cap_hf.recovery.healing.has_states", lambda *_: False)
    teacher = MAKERS["vit"]()
    model = sparse(copy.deepcopy(teacher), 0.6)
    pixels = {"pixel_values": torch.stack([each["pixel_values"] for each in images(8)])}
    trainer = make_trainer(model, teacher, images(), str(tmp_path))
    trainer.augmentation = None  # the loss of the images as they are
    loss = trainer.compute_loss(model.train(), pixels | {"labels": torch.zeros(8, dtype=torch.long)})
    with torch.no_grad():
        own, other = (each(**pixels).logits.log_softmax(-1) for each in (model, teacher))
    torch.testing.assert_close(loss.detach(), F.kl_div(own, other, reduction="batchmean", log_target=True))
    assert "ViTForImageClassification gives no hidden states: it learns without them." in caplog.text


def test_what_cannot_be_healed_is_one_line_before_any_work():
    teacher = MAKERS["vit"]()
    for model, other, message in (
        (tiny_vit(num_channels=3, problem_type="multi_label_classification"), teacher, "healing is for models that"),
        (teacher, teacher, "the teacher is the model itself"),
        (sparse(tiny_vit(num_channels=3, hidden_size=32)), teacher, r"hidden state 0 is \(5, 16\) in the teacher"),
    ):
        with pytest.raises(CAPError, match=message):
            check_healing(model, other, images())
    with pytest.raises(CAPError, match="steps=-1 heals nothing"):
        heal(sparse(MAKERS["vit"]()), teacher, images(), -1)
    with pytest.raises(CAPError, match=r"lower --learning_rate \(of cap-hf prune --heal_learning_rate\)"):
        heal(sparse(MAKERS["vit"]()), teacher, images(), 6, 16, 1e38, disable_tqdm=True)


def test_ctrl_c_leaves_no_folder_and_no_hook(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def interrupted(*_, **__):
        seen.extend(Path(tmp_path).iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("cap_hf.recovery.trainer.SparseTrainer.compute_loss", interrupted)
    teacher = MAKERS["vit"]()
    model = sparse(copy.deepcopy(teacher))
    with pytest.raises(KeyboardInterrupt):
        heal(model, teacher, images(), **QUICK)
    assert seen
    # Else the gradients of a later training would be masked by what was 0 now.
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert not list(tmp_path.iterdir())
