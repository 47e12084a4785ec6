"""`cap-hf finetune` of models without a head, which learn a dense one's features from images without labels."""

import json

import pytest
import torch
from support.backbones import tiny_clip, tiny_dinov2
from support.finetuning import QUICK, finetune, unlabelled_folder
from support.launching import ROOT, launch
from support.recovery import sparse, zeros
from transformers import CLIPModel, ViTImageProcessorPil

from cap_hf.checkpoints.loading import load_checkpoint
from cap_hf.masks import differing_layers
from cap_hf.recovery.mask_holder import model_sparsity
from cap_hf.targets import find_targets


@pytest.fixture(scope="module", params=["dinov2", "clip"])
def backbones(request, tmp_path_factory):
    """A sparse student without a head, the dense model that it was made of, and images in folders without labels."""
    base = tmp_path_factory.mktemp("backbones")
    make = {"dinov2": tiny_dinov2, "clip": tiny_clip}[request.param]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    for name, model in (("student", sparse(make())), ("teacher", make())):
        model.save_pretrained(base / name)
        processor.save_pretrained(base / name)
    return base / "student", base / "teacher", unlabelled_folder(base / "images")


def test_a_backbone_is_recovered_without_labels(tmp_path, backbones, capsys):
    student, teacher, data = backbones
    output = tmp_path / "recovered"
    arguments = (
        "--teacher_model_name_or_path",
        str(teacher),
        "--dataset_name",
        str(data),
        "--max_steps",
        "20",
        "--learning_rate",
        "2e-3",
    )
    evaluation = ("--eval_strategy", "steps", "--eval_steps", "10", "--save_steps", "10")
    best = ("--load_best_model_at_end", "True", "--weight_decay", "0.1")
    assert finetune(student, output, *arguments, *evaluation, *best) == 0
    before, after = load_checkpoint(student), load_checkpoint(output)
    assert type(after) is type(before)
    for name, zero in zeros(before).items():
        assert torch.equal(zeros(after)[name], zero), name
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed
    if isinstance(after, CLIPModel):
        assert all(name.startswith("vision_model.") for name in changed)
    report = json.loads((output / "report.json").read_text())
    assert report["sparsity"] == report["sparsity_before"] == model_sparsity(before)
    assert report["dense"]["cosine"] == 1
    assert report["sparse"]["cosine"] < report["recovered"]["cosine"] < 1
    assert report["sparse"]["patch_error"] > report["recovered"]["patch_error"] > 0
    assert [entry["step"] for entry in report["log_history"] if "eval_loss" in entry] == [10, 20]
    assert differing_layers(find_targets(after), report) == []
    table = capsys.readouterr().out
    assert all(word in table for word in ("dense", "sparse", "recovered", "cosine"))


def test_a_backbone_is_pruned_while_it_learns(tmp_path, backbones):
    _, teacher, data = backbones
    arguments = ("--teacher_model_name_or_path", str(teacher), "--dataset_name", str(data), "--num_grads", "8")
    assert finetune(teacher, tmp_path / "out", *arguments, "--sparsity_schedule", "0.3,0.6,2,linear") == 0
    assert model_sparsity(load_checkpoint(tmp_path / "out")) == pytest.approx(0.6, abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "has no head to learn labels with: name the dense model, whose features it learns, with --teacher_model"),
        (("--teacher_model_name_or_path", "WIDE"), "(1, 32) in the teacher and (1, "),
        (("--teacher_model_name_or_path", "DENSE", "--dataset_name", "nowhere"), "--dataset_name nowhere cannot be"),
        (
            ("--teacher_model_name_or_path", "DENSE", "--metric_for_best_model", "top1"),
            "--metric_for_best_model top1 is not one of loss",
        ),
        (
            (
                "--teacher_model_name_or_path",
                "DENSE",
                "--sparsity_schedule",
                "0.6,0.7,2,linear",
                "--fisher_loss",
                "labels",
            ),
            "there is no column of labels among image",
        ),
    ],
)
def test_what_a_backbone_cannot_learn_from_is_one_line(tmp_path, backbones, capsys, arguments, message):
    student, teacher, data = backbones
    tiny_dinov2(hidden_size=32).save_pretrained(tmp_path / "wide")
    names = {"WIDE": str(tmp_path / "wide"), "DENSE": str(teacher)}
    assert finetune(student, tmp_path / "out", "--dataset_name", str(data), *(names.get(a, a) for a in arguments)) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cap-hf finetune:")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


def test_two_processes_train_a_tower_as_one_does(tmp_path, backbones):
    student, teacher, data = backbones
    arguments = ["--teacher_model_name_or_path", str(teacher), "--dataset_name", str(data), "--optim", "sgd"]
    arguments += ["--per_device_train_batch_size", "4"]
    assert finetune(student, tmp_path / "one", *arguments, "--gradient_accumulation_steps", "2") == 0
    names = ["--model_name_or_path", str(student), "--output_dir", str(tmp_path / "two"), *QUICK, *arguments]
    launch(2, *names, script=ROOT / "scripts" / "finetune.py")
    one, two = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "two")
    start = load_checkpoint(student).state_dict()
    for (name, own), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3, msg=name)
        if name.startswith("text_model."):
            assert torch.equal(other, start[name])
    assert any(not torch.equal(own, start[name]) for name, own in one.state_dict().items())
