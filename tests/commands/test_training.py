"""What `cap-hf finetune` is told: presets are defaults, and what is given goes before them."""

import json

import pytest
import yaml
from support.finetuning import finetune, load, unlabelled_folder
from support.recovery import assert_same_zeros, image_processor, sparse, tiny_vit, zeros

from cap_hf.commands.training import read_arguments
from cap_hf.errors import CAPError
from cap_hf.recovery.presets import HEAL
from cap_hf.recovery.training_arguments import SparseTrainingArguments

COMMON = {"model_name_or_path": "user/student", "teacher_model_name_or_path": "user/dense", "use_cpu": True}


def training(values, path=None):
    """The training's arguments, given on the command line or in a file."""
    values = COMMON | values
    if path is not None:
        path.write_text(yaml.safe_dump(values))
        return read_arguments([str(path)])[3]
    return read_arguments([word for name, value in values.items() for word in (f"--{name}", str(value))])[3]


@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_given_goes_before_a_preset_also_where_it_is_the_usual_default(tmp_path, in_file):
    path = tmp_path / "run.yaml" if in_file else None
    usual, heal = training({}, path), training({"preset": "heal"}, path)
    assert {name: getattr(heal, name) for name in HEAL} == HEAL
    # Nothing else is touched.
    names = set(SparseTrainingArguments.__dataclass_fields__) - HEAL.keys() - {"output_dir", "logging_dir"}
    assert not [name for name in names if getattr(heal, name, None) != getattr(usual, name, None)]
    given = {"learning_rate": usual.learning_rate, "hard_label_weight": 1.0, "max_steps": 7, "augmentation": "none"}
    assert HEAL["learning_rate"] != usual.learning_rate
    found = training({"preset": "heal", **given}, path)
    assert {name: getattr(found, name) for name in given} == given
    assert found.lr_scheduler_type == HEAL["lr_scheduler_type"]
    assert training({"preset": "heal", "num_train_epochs": 2}, path).max_steps == -1


def test_what_a_preset_lacks_is_one_line():
    with pytest.raises(CAPError, match="--preset heal learns from the dense model alone: name it with --teacher_model"):
        read_arguments(["--model_name_or_path", "user/student", "--preset", "heal"])
    with pytest.raises(CAPError, match="argument --preset: invalid choice: 'cure'"):
        read_arguments(["--model_name_or_path", "user/student", "--preset", "cure"])


def test_a_classifier_is_healed_on_a_folder_without_labels(tmp_path):
    model = tiny_vit(num_channels=3)
    for name, each in (("dense", model), ("student", sparse(tiny_vit(num_channels=3), 0.6))):
        each.save_pretrained(tmp_path / name)
        processor = image_processor()
        processor.image_mean = processor.image_std = [0.5] * 3
        processor.save_pretrained(tmp_path / name)
    data = unlabelled_folder(tmp_path / "images")
    arguments = ["--preset", "heal", "--teacher_model_name_or_path", str(tmp_path / "dense")]
    arguments += ["--dataset_name", str(data), "--max_steps", "30", "--bf16", "True"]
    # The tests' processors may have no instructions for it; the model is tiny.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cap_hf.recovery.precision.bfloat16_ratio", lambda: 1.0)
        assert finetune(tmp_path / "student", tmp_path / "out", *arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["preset"] == "heal"
    assert report["sparse"]["cosine"] < report["recovered"]["cosine"] < 1
    assert report["training_arguments"]["hard_label_weight"] == 0
    assert not list((tmp_path / "out-training").glob("checkpoint-*"))
    assert_same_zeros(load(tmp_path / "out"), zeros(load(tmp_path / "student")))
