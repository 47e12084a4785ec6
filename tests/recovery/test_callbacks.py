"""What happens at which moment of a run: masks, pruning steps, random numbers."""

import json
import logging

import pytest
import torch
from support.recovery import make_trainer, sparse_vit, tiny_vit, zeros
from transformers import TrainerCallback

from cap_hf.errors import CAPError
from cap_hf.recovery.callbacks import isolated_random_state
from cap_hf.recovery.mask_holder import model_sparsity


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


def test_a_checkpoint_of_another_schedule_is_not_resumed(tmp_path):
    """It would end at less than the schedule's sparsity: steps that lie behind it are taken for done."""
    make_trainer(tmp_path, tiny_vit(), max_steps=4, save_steps=2).train()
    model = tiny_vit()
    trainer = make_trainer(tmp_path, model, max_steps=4, sparsity_schedule="0.9")
    with pytest.raises(CAPError, match=r"prunes to 0\.9 at optimizer step 0, and the run .* of step 2 did not"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    make_trainer(tmp_path, tiny_vit(), max_steps=4, save_steps=2, sparsity_schedule="0.5").train()
    with pytest.raises(CAPError, match="resume with that run's schedule and length"):
        make_trainer(tmp_path, tiny_vit(), max_steps=4, sparsity_schedule="0.6").train(True)


class StopEarly(TrainerCallback):
    """Ends a run after its second optimizer step, as EarlyStoppingCallback may."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_ends_before_its_last_pruning_step_says_so(tmp_path, caplog):
    options = {"sparsity_schedule": "0.3,0.8,3,linear", "max_steps": 6}
    make_trainer(tmp_path, tiny_vit(), callbacks=[StopEarly()], **options).train()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "cap_hf.recovery.callbacks"]
    assert message == "Training ended at optimizer step 2, before the pruning step to sparsity 0.8 at step 4."
    caplog.clear()
    make_trainer(tmp_path, tiny_vit(), **options).train()
    assert not [record for record in caplog.records if record.name == "cap_hf.recovery.callbacks"]


def test_an_n_m_schedule_holds_its_pattern_to_the_end(tmp_path):
    model = tiny_vit()
    trainer = make_trainer(tmp_path, model, sparsity_schedule="0.5", max_steps=3, ema_decay=0.5, allocation="2:4")
    trainer.train()
    for zero in zeros(model).values():
        assert (zero.unflatten(1, (-1, 4)).sum(dim=-1) == 2).all()


def test_random_numbers_are_as_they_were():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with isolated_random_state(torch.device("cpu")):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)
