"""A preset is a set of defaults: of fields that there are, and none that leaves without effect what was given."""

from dataclasses import fields

from cap_hf.recovery.presets import TRAINING_PRESETS, WITHOUT, defaults_beside
from cap_hf.recovery.training_arguments import SparseTrainingArguments


def test_presets_set_fields_of_the_training(tmp_path):
    names = {each.name for each in fields(SparseTrainingArguments)}
    for name, preset in TRAINING_PRESETS.items():
        assert set(preset) <= names, name
        args = SparseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **preset)
        assert args.max_steps == preset["max_steps"]
    assert {*WITHOUT, *WITHOUT.values()} <= names


def test_a_preset_sets_nothing_that_would_undo_what_was_given():
    assert defaults_beside({"learning_rate": 1.0}) == defaults_beside({"preset": None}) == {}
    heal = defaults_beside({"preset": "heal"})
    assert heal == TRAINING_PRESETS["heal"]
    assert heal.keys() - defaults_beside({"preset": "heal", "num_train_epochs": 3.0}) == {"max_steps"}
    assert heal.keys() - defaults_beside({"preset": "heal", "save_steps": 10}) == {"save_strategy"}
