"""Killed with SIGKILL at any step and resumed, a run ends with the weights of one that was never killed."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from support.recovery import GRADUAL, assert_same_zeros, make_trainer, sparse_vit, tiny_vit, zeros
from support.warm import run_forked

from cap_hf.errors import CAPError
from cap_hf.recovery.mask_holder import model_sparsity
from cap_hf.recovery.resume import choose_checkpoint, last_whole_checkpoint, load_weights, remove_checkpoints


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A model after a whole run, and the folder of that run with a checkpoint of every step."""
    model, folder = tiny_vit(), tmp_path_factory.mktemp("whole")
    make_trainer(folder, model, **{**GRADUAL, "save_steps": 1}).train()
    return model, folder


def assert_equal(model, other):
    for (name, own), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(own, expected), name


def run_until_killed(folder, moment, step):
    script = Path(__file__).parents[1] / "support" / "recovery.py"
    process = run_forked(script, [str(folder), moment, str(step), json.dumps(GRADUAL)], os.environ)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]


# The schedule prunes at steps 0, 4 and 8; checkpoints are written at 3, 6, 9 and 12.
@pytest.mark.parametrize(
    ("moment", "step", "resumes_at"),
    [
        ("begin", 4, 3),  # pruned at 4, nothing written since
        ("end", 8, 6),  # between the second and the third pruning step
        ("save", 9, 6),  # half a checkpoint is left
    ],
)
def test_killed_and_resumed_is_the_same_run(tmp_path, uninterrupted, moment, step, resumes_at):
    run_until_killed(tmp_path, moment, step)
    assert last_whole_checkpoint(tmp_path).endswith(f"checkpoint-{resumes_at}")
    assert (tmp_path / "checkpoint-9").exists() == (moment == "save")
    model = tiny_vit()
    trainer = make_trainer(tmp_path, model, **GRADUAL)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    assert model_sparsity(model) == pytest.approx(0.8, abs=1e-3)
    assert_same_zeros(model, zeros(uninterrupted[0]))
    assert_equal(model, uninterrupted[0])


# A checkpoint of the very step of a pruning step was written before it: the resumed run must still prune.
@pytest.mark.parametrize("step", [4, 8, 9])
def test_pruning_steps_are_neither_repeated_nor_lost(uninterrupted, step):
    expected, folder = uninterrupted
    model = tiny_vit()
    trainer = make_trainer(folder, model, **{**GRADUAL, "save_steps": 100})
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert [entry["step"] for entry in trainer.state.log_history if "sparsity" in entry] == [0, 4, 8]
    assert_equal(model, expected)


def test_a_denser_checkpoint_is_not_resumed(tmp_path):
    make_trainer(tmp_path, tiny_vit(), save_steps=2, max_steps=2).train()
    trainer = make_trainer(tmp_path, sparse_vit(), max_steps=4)
    with pytest.raises(CAPError, match="no longer 0"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_from_nothing_is_one_line(tmp_path):
    with pytest.raises(CAPError, match="no checkpoint to resume from"):
        make_trainer(tmp_path, tiny_vit()).train(resume_from_checkpoint=True)


def write_checkpoint(folder, step, state="{}"):
    (folder / f"checkpoint-{step}").mkdir()
    if state is not None:
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"half'), (12, None)):
        write_checkpoint(tmp_path, step, state)
    (tmp_path / "checkpoint-best").mkdir()
    whole = str(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path) == whole
    assert {choose_checkpoint(tmp_path, each) for each in ("last", "True", True)} == {whole}
    assert choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-9")) == str(tmp_path / "checkpoint-9")
    assert {choose_checkpoint(tmp_path, each) for each in (None, False, "False", "")} == {None}
    for half in ("checkpoint-11", "checkpoint-12", "nowhere"):
        with pytest.raises(CAPError, match=f"{half} is not a whole checkpoint"):
            choose_checkpoint(tmp_path, str(tmp_path / half))
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_only_checkpoints_are_removed(tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    for name in ("runs", "checkpoint-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    remove_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "checkpoint-mine", "checkpoint-3"}
    remove_checkpoints(tmp_path / "nowhere")


def test_weights_of_another_model_are_not_loaded(tmp_path):
    model = tiny_vit()
    tiny_vit(1, intermediate_size=64).save_pretrained(tmp_path / "wider")
    for folder in ("wider", "nowhere"):
        with pytest.raises(CAPError, match=f"{folder} cannot be loaded") as caught:
            load_weights(model, str(tmp_path / folder))
        assert "\n" not in str(caught.value)
        assert_equal(model, tiny_vit())


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def test_weights_come_back_as_they_were_saved(tmp_path):
    model, other = sparse_vit(), tiny_vit(1)
    load_weights(other, save(model, tmp_path / "own"))
    assert_equal(other, model)
