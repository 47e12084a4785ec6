"""`cap-hf finetune` end to end on classifiers, alone and with two processes; backbones have a file of their own."""

import json

import pytest
import torch
from support.finetuning import NAMES, QUICK, finetune, load, unlabelled_folder
from support.launching import ROOT, launch_with_accelerate
from support.recovery import image_processor, tiny_vit, zeros
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification

from cap_hf.commands.main import main
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.data.splits import load_splits
from cap_hf.masks import differing_layers
from cap_hf.recovery.mask_holder import model_sparsity
from cap_hf.recovery.resume import last_whole_checkpoint
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.targets import find_targets


def test_recovery_keeps_exactly_the_zeros(tmp_path, folders, capsys):
    student, teacher = folders
    output = tmp_path / "recovered"
    assert finetune(student, output, "--teacher_model_name_or_path", str(teacher), "--hidden_state_weight", "0.5") == 0
    before, after = load(student), load(output)
    for name, zero in zeros(before).items():
        assert torch.equal(zeros(after)[name], zero), name
    assert not torch.equal(before.classifier.weight, after.classifier.weight)
    report = json.loads((output / "report.json").read_text())
    assert report["sparsity"] == report["sparsity_before"] == model_sparsity(before)
    assert report["dense"]["num_examples"] == 60
    assert report["sparse"] != report["recovered"]
    assert differing_layers(find_targets(after), report) == []
    assert differing_layers(find_targets(load(teacher)), report) == [layer["name"] for layer in report["layers"]]
    assert report["training"]["steps"] == 4
    assert CAPConfig.load(output).num_grads == 77
    assert AutoImageProcessor.from_pretrained(output).size == {"height": 8, "width": 8}
    # Nothing but the checkpoint: no pickle, no teacher.
    assert {path.suffix for path in output.iterdir()} == {".json", ".safetensors"}
    assert len(list(output.glob("*.safetensors"))) == 1
    table = capsys.readouterr().out
    assert all(word in table for word in ("dense", "sparse", "recovered"))


def test_gradual_pruning_from_a_dense_model(tmp_path, folders):
    output = tmp_path / "gradual"
    arguments = ("--sparsity_schedule", "0.3,0.75,2,cubic", "--num_grads", "32", "--ema_decay", "0.5")
    assert finetune(folders[1], output, *arguments) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["sparsity"] == model_sparsity(load(output)) == pytest.approx(0.75, abs=1e-3)
    steps = {entry["step"]: entry["sparsity"] for entry in report["log_history"] if "sparsity" in entry}
    assert steps == pytest.approx({0: 0.3, 2: 0.75}, abs=1e-3)
    assert report["dense"] is None
    assert CAPConfig.load(output).num_grads == report["config"]["num_grads"] == 32


def test_a_finished_part_is_resumed(tmp_path, folders, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ("--sparsity_schedule", "0.65,0.75,2,cubic", "--num_grads", "32", "--save_steps", "1")
    assert finetune(folders[0], whole, *arguments) == 0
    checkpoints = tmp_path / "parts-training"
    (tmp_path / "whole-training").rename(checkpoints)
    for step in (2, 3, 4):
        (checkpoints / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert finetune(folders[0], parts, *arguments) == 1
    assert "--resume_from_checkpoint last" in capsys.readouterr().err
    assert finetune(folders[0], parts, *arguments, "--resume_from_checkpoint", "last") == 0
    for own, other in zip(load(parts).state_dict().values(), load(whole).state_dict().values(), strict=True):
        assert torch.equal(own, other)


def test_a_yaml_file_of_the_same_names(tmp_path, folders):
    path = tmp_path / "recipe.yaml"
    lines = [f"{name[2:]}: {value}" for name, value in zip(QUICK[::2], QUICK[1::2], strict=True)]
    lines += [f"model_name_or_path: {folders[0]}", f"output_dir: {tmp_path / 'out'}", "augmentation: light"]
    # YAML takes 1e-2 for a word.
    path.write_text("\n".join(lines).replace("1e-2", "0.01"))
    assert main(["finetune", str(path)]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["training_arguments"]["augmentation"] == "light"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity_schedule", "0.9,0.7,2,linear"), "the sparsity schedule goes down"),
        (("--sparsity_schedule", "0.2,0.9,2,linear"), "the schedule starts at sparsity 0.2, but the model is"),
        (
            ("--sparsity_schedule", "0.7,0.9,2,linear", "--allocation", "2:4"),
            "--allocation 2:4 goes with --sparsity_schedule 0.5 alone: sparsity 0.7 contradicts 2:4",
        ),
        (
            ("--allocation", "2:4", "--num_grads", "32"),
            "--allocation, --num_grads without --sparsity_schedule prunes nothing",
        ),
        (("--sparsity_schedule", "0.9", "--refit", "true"), "--refit is for cap-hf prune: here training moves"),
        (("--sparsity_schedule", "0.9", "--refit_ridge", "0.1"), "--refit_ridge is for cap-hf prune"),
        (("--teacher_model_name_or_path", "WIDE", "--hidden_state_weight", "1"), "hidden state 0 is"),
        (("--teacher_model_name_or_path", "LABELS"), "the teacher has 4 labels, the student 10"),
        (("--teacher_model_name_or_path", "PIXELS"), "normalises images to mean"),
        (("--teacher_model_name_or_path", "nowhere"), "nowhere cannot be loaded"),
        (("--augmentation", "mighty"), "invalid choice: 'mighty'"),
        (("--adam_beta1", "7"), "adamw_torch_fused cannot be made: Invalid beta parameter"),
        (("--lr_scheduler_type", "cosine_with_min_lr"), "cosine_with_min_lr cannot be made: One of min_lr"),
        (("--metric_for_best_model", "accuracy"), "--metric_for_best_model accuracy is not one of loss, top1, top5"),
        (("--fsdp", "full_shard"), "Using fsdp only works in distributed training"),
        (("--max_steps", "0"), "max_steps=0 trains nothing"),
        (("--learning_rate", "-1"), "learning_rate=-1.0 must be 0 or greater"),
        (("--per_device_train_batch_size", "0"), "per_device_train_batch_size=0 must be at least 1"),
        (("--model_name_or_path", "CONFIG"), "cap_config.json of CONFIG cannot be read: "),
        (("--model_name_or_path", "TUPLES"), "return_dict is false in the model's config"),
        (("--resume_from_checkpoint", "nowhere"), "--resume_from_checkpoint nowhere is not a whole checkpoint"),
        (("--resume_from_checkpoint", "last"), "there is no checkpoint to resume from"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, folders, capsys, arguments, message):
    others = {"WIDE": {**NAMES, "hidden_size": 32}, "LABELS": {}, "PIXELS": NAMES, "CONFIG": NAMES}
    others["TUPLES"] = {**NAMES, "return_dict": False}
    names = []
    for argument in arguments:
        if argument in others:
            tiny_vit(1, **others[argument]).save_pretrained(tmp_path / argument)
            processor = image_processor()
            processor.image_mean = [0.1] if argument == "PIXELS" else [0.5]
            processor.save_pretrained(tmp_path / argument)
            (tmp_path / "CONFIG" / "cap_config.json").write_text('{"num_grads": ') if argument == "CONFIG" else None
            message = message.replace(argument, str(tmp_path / argument))
            argument = str(tmp_path / argument)
        names.append(argument)
    capsys.readouterr()
    assert finetune(folders[0], tmp_path / "out", *names) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cap-hf finetune:")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out-training/checkpoint-*"))


def test_the_teacher_is_evaluated_in_its_own_precision(tmp_path, folders, monkeypatch):
    """Also of a model that does not cast its inputs, in a run whose teacher answers in bfloat16."""
    monkeypatch.setattr("cap_hf.recovery.precision.bfloat16_ratio", lambda: 1.0)
    torch.manual_seed(0)
    config = ResNetConfig(depths=[1, 1], hidden_sizes=[8, 16], embedding_size=4, num_channels=1, **NAMES)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    image_processor().save_pretrained(tmp_path / "resnet")
    found = []
    for bf16 in ("False", "True"):
        arguments = ("--teacher_model_name_or_path", str(tmp_path / "resnet"), "--teacher_bf16", bf16)
        assert finetune(folders[0], tmp_path / bf16, *arguments) == 0
        found.append(json.loads((tmp_path / bf16 / "report.json").read_text())["dense"])
    assert found[0] == found[1]


def test_a_run_that_is_begun_anew_leaves_no_checkpoint_of_the_one_before(tmp_path, folders, capsys):
    output, training = tmp_path / "out", tmp_path / "out-training"
    assert finetune(folders[0], output, "--save_steps", "1") == 0
    assert (training / "checkpoint-4").is_dir()
    (training / "mine").write_text("kept")
    # What cannot begin takes nothing away.
    assert finetune(folders[0], output, "--overwrite_output_dir", "--max_train_samples", "0") == 1
    assert finetune(folders[0], output, "--save_steps", "1") == 1
    assert (training / "checkpoint-4").is_dir()
    assert finetune(folders[0], output, "--overwrite_output_dir", "--save_steps", "1", "--max_steps", "2") == 0
    assert {path.name for path in training.iterdir()} >= {"checkpoint-1", "checkpoint-2", "mine"}
    assert last_whole_checkpoint(training) == str(training / "checkpoint-2")


def test_what_ctrl_c_leaves_can_be_gone_on_from(tmp_path, folders, monkeypatch, capsys):
    arguments = ("--sparsity_schedule", "0.65,0.75,2,cubic", "--num_grads", "32", "--save_steps", "1")
    assert finetune(folders[0], tmp_path / "whole", *arguments) == 0
    with monkeypatch.context() as patch:
        own_loss, calls = SparseTrainer.compute_loss, []

        def interrupted(self, model, *args, **kwargs):
            calls.extend([None] * model.training)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return own_loss(self, model, *args, **kwargs)

        patch.setattr(SparseTrainer, "compute_loss", interrupted)
        assert finetune(folders[0], tmp_path / "out", *arguments) == 130
    assert not (tmp_path / "out").exists()
    assert last_whole_checkpoint(tmp_path / "out-training").endswith("checkpoint-3")
    assert finetune(folders[0], tmp_path / "out", *arguments, "--resume_from_checkpoint", "last") == 0
    resumed, whole = (load(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_without_evaluation_no_split_to_evaluate_on_is_needed(tmp_path, folders, capsys):
    rows = load_dataset_rows(40)
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    arguments = ("--dataset_name", str(tmp_path / "data"), "--do_eval", "False", "--max_steps", "1")
    assert finetune(folders[0], tmp_path / "out", *arguments) == 0
    assert "% sparsity, not evaluated" in capsys.readouterr().out


def load_dataset_rows(count):
    """Some of the embedded digits."""
    return load_splits(DataArguments(), needed=["train"])["train"].select(range(count))


def test_a_compressed_checkpoint_is_recovered(tmp_path, folders):
    assert main(["compress", "--model_name_or_path", str(folders[0]), "--output_dir", str(tmp_path / "small")]) == 0
    results = []
    for name, student in (("plain", folders[0]), ("compressed", tmp_path / "small")):
        assert finetune(student, tmp_path / name) == 0
        results.append(load(tmp_path / name).state_dict())
    for own, other in zip(*(each.values() for each in results), strict=True):
        assert torch.equal(own, other)


def test_what_is_there_is_not_replaced(tmp_path, folders, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    assert finetune(folders[0], tmp_path / "out") == 1
    assert "pass --overwrite_output_dir" in capsys.readouterr().err
    assert (tmp_path / "out" / "kept").read_text() == "mine"


def test_two_processes_are_one_with_twice_the_batch(tmp_path, folders):
    student, teacher = folders
    arguments = ["--sparsity_schedule", "0.65,0.8,2,linear", "--num_grads", "64", "--ema_decay", "0.5"]
    arguments += ["--teacher_model_name_or_path", str(teacher), "--optim", "sgd"]
    assert finetune(student, tmp_path / "one", *arguments, "--gradient_accumulation_steps", "2") == 0
    names = ["--model_name_or_path", str(student), "--output_dir", str(tmp_path / "two"), *QUICK, *arguments]
    launch_with_accelerate(2, *names, script=ROOT / "scripts" / "finetune.py")
    assert json.loads((tmp_path / "two" / "report.json").read_text())["num_processes"] == 2
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for name, zero in zeros(load(student)).items():
        assert zeros(two)[name][zero].all(), name
    assert model_sparsity(two) == model_sparsity(one) == pytest.approx(0.8, abs=1e-3)
    for (name, own), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3, msg=name)


def test_a_classifier_learns_from_images_without_labels(tmp_path, folders, capsys):
    student, teacher = folders
    data = unlabelled_folder(tmp_path / "images")
    arguments = ("--dataset_name", str(data), "--max_steps", "2")
    assert finetune(student, tmp_path / "out", *arguments) == 1
    assert "cap-hf finetune: there is no column of labels among image" in capsys.readouterr().err
    assert finetune(student, tmp_path / "out", *arguments, "--teacher_model_name_or_path", str(teacher)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sparse"]["cosine"] < 1
    assert "top1" not in report["recovered"]
