"""The recipes of the paper's runs: every command in their comments is one, and each runs on a tiny model."""

import importlib
import json
import re
import shlex
from itertools import pairwise

import pytest
import transformers
import yaml
from support.models import TINY_VIT
from support.scripts import SCRIPTS

from cap_hf.checkpoints.loading import load_checkpoint
from cap_hf.commands.main import run
from cap_hf.commands.training import read_arguments
from cap_hf.recovery.schedules import SparsitySchedule

RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))
ROOT = SCRIPTS.parent


def comments(path):
    """The lines of a recipe's head without their marks, joined where a backslash ends one."""
    head = path.read_text().partition("\nmodel_name_or_path:")[0]
    return re.sub(r"\\\n *", "", "\n".join(line.lstrip("# ") for line in head.splitlines()))


def commands(path):
    """The argument lists of the commands of a recipe, without its launcher, for one GPU and for eight."""
    lines = re.findall(r"^(1 GPU|8 GPUs): +(.*)$", comments(path), re.MULTILINE)
    one, eight = (shlex.split(line) for _, line in lines)
    assert one[0] == "cap-hf"
    command = one[1]
    assert eight[:6] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "8", f"scripts/{command}.py"]
    assert (ROOT / eight[5]).is_file()
    return command, one[2:], eight[6:]


def variations(path):
    """What the comments say to put after the file, by what it is for."""
    head = path.read_text().partition("\nmodel_name_or_path:")[0]
    found = re.findall(r"^#   (\S+(?: %)?) +(--.*)$", head, re.MULTILINE)
    return {name: shlex.split(arguments) for name, arguments in found}


MODELS = {"DeiT-Ti", "DeiT-B", "ViT-B", "DINOv2-S", "DINOv2-B", "DINOv2-L", "ConvNeXt", "ResNet-50"}
STAGES = {"gradual": {"60 %", "75 %"}, "one_shot_finetune": {"50 %", "90 %"}}


def parsed(command, argv, monkeypatch):
    """The dataclasses that a command makes of its arguments, before it loads anything."""
    monkeypatch.chdir(ROOT)
    if command == "finetune":
        return read_arguments(argv)
    seen = []
    module = importlib.import_module("cap_hf.commands.prune")
    with monkeypatch.context() as patch:
        patch.setattr(module, "prune", lambda *found: seen.extend(found))
        patch.setattr(module, "check_output", lambda *_: None)
        patch.setattr(module, "check_place", lambda *_: None)
        module.main(argv)
    return seen


def test_there_is_one_recipe_per_schedule():
    assert [path.stem for path in RECIPES] == ["gradual", "one_shot", "one_shot_finetune", "two_of_four"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_are_parsed(path, monkeypatch):
    command, one, eight = commands(path)
    assert one[0] == eight[0] == f"scripts/recipes/{path.name}"
    alone, together = (parsed(command, argv, monkeypatch) for argv in (one, eight))
    model_args = alone[0].model if command == "prune" else alone[0]
    assert model_args.model_name_or_path == "facebook/deit-small-patch16-224"
    if command == "finetune":
        images = [
            args[3].per_device_train_batch_size * args[3].gradient_accumulation_steps for args in (alone, together)
        ]
        assert images == [1024, 128]  # a step takes 1,024 images in either
    others = variations(path)
    assert set(others) == MODELS | STAGES.get(path.stem, set())
    for argv in others.values():
        parsed(command, [*one, *argv], monkeypatch)
    assert "arXiv 2210.09223" in comments(path)
    assert "IST-DASLab/CAP" in comments(path)


def quick(folder, *more):
    names = [
        "--model_name_or_path",
        str(folder / "tiny"),
        "--dataset_name",
        "digits",
        "--output_dir",
        str(folder / "out"),
    ]
    return [*names, "--num_grads", "8", "--max_eval_samples", "16", *more]


TRAINING = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--bf16", "false"]
TRAINING += ["--use_cpu", "true", "--max_train_samples", "16", "--eval_strategy", "no", "--save_strategy", "no"]
TRAINING += ["--logging_steps", "1", "--disable_tqdm", "true"]


def save_tiny(folder, model):
    model.save_pretrained(folder / "tiny")
    size = {"height": 8, "width": 8}
    processor = transformers.ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False)
    processor.save_pretrained(folder / "tiny")


def tiny_vit():
    transformers.set_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY_VIT))


@pytest.mark.parametrize("name", ["one_shot_finetune", "two_of_four", "gradual"])
def test_a_training_recipe_runs_and_its_learning_rate_is_the_papers(name, tmp_path, capsys):
    save_tiny(tmp_path, tiny_vit())
    path = SCRIPTS / "recipes" / f"{name}.yaml"
    said = yaml.safe_load(path.read_text())
    assert run("finetune", [str(path), *quick(tmp_path, *TRAINING)]) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    steps = SparsitySchedule.parse(said["sparsity_schedule"]).steps
    assert report["sparsity"] == pytest.approx(steps[-1][1], abs=1e-3)
    # An optimizer step is an epoch here, and what is logged is the rate of the next one.
    epochs, cycle = said["num_train_epochs"], {"gradual": 20}.get(name, said["num_train_epochs"])
    highest, lowest = float(said["learning_rate"]), 1e-5
    expected = [highest - (highest - lowest) * (step % cycle) / cycle for step in range(epochs)]
    rates = [entry["learning_rate"] for entry in report["log_history"] if "learning_rate" in entry]
    assert rates == pytest.approx(expected, rel=1e-6)


def test_the_gradual_schedule_is_that_of_the_authors():
    """Theirs is in linear pieces between (epoch, sparsity): 20 0.5, 40 0.6, 100 0.75, 280 0.9."""
    said = yaml.safe_load((SCRIPTS / "recipes" / "gradual.yaml").read_text())
    pieces = [(20, 0.5), (40, 0.6), (100, 0.75), (280, 0.9)]
    found = SparsitySchedule.parse(said["sparsity_schedule"]).steps
    assert [epoch for epoch, _ in found] == list(range(20, 300, 20))
    for epoch, sparsity in found:
        (first, low), (last, high) = next(pair for pair in pairwise(pieces) if pair[0][0] <= epoch <= pair[1][0])
        assert sparsity == pytest.approx(low + (high - low) * (epoch - first) / (last - first), abs=1e-6)


@pytest.mark.parametrize("family", ["vit", "convnext", "resnet"])
def test_the_one_shot_recipe_runs_on_each_family(family, tmp_path, capsys):
    transformers.set_seed(0)
    more = []
    if family == "vit":
        model = tiny_vit()
    elif family == "convnext":
        sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
        model = transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(**sizes, num_channels=1, image_size=8, num_labels=10)
        )
        more = ["--exclude", "*.dwconv"]
    else:
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        model = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(**sizes, num_channels=1, num_labels=10)
        )
        more = ["--fisher_block_size", "256"]
    save_tiny(tmp_path, model)
    recipe = str(SCRIPTS / "recipes" / "one_shot.yaml")
    assert run("prune", [recipe, *quick(tmp_path, *more, "--disable_tqdm", "true")]) == 0, capsys.readouterr().err
    for sparsity in (0.5, 0.75, 0.9):
        report = json.loads((tmp_path / "out" / f"sparsity-{sparsity:g}" / "report.json").read_text())
        assert report["pruning"]["sparsity"] == pytest.approx(sparsity, abs=1e-2)
    if family == "convnext":
        pruned = load_checkpoint(tmp_path / "out" / "sparsity-0.9")
        weights = {name: weight for name, weight in pruned.named_parameters() if name.endswith("dwconv.weight")}
        assert weights
        assert all(bool((weight != 0).all()) for weight in weights.values())
