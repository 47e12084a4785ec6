"""What is no recovery is one line, before anything is loaded."""

import pytest
import torch
from support.recovery import make_trainer, sparse_vit

from cap_hf.errors import CAPError
from cap_hf.recovery.training_arguments import SparseTrainingArguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity_schedule": "0.9,0.5,3,linear"}, "goes down"),
        ({"sparsity_schedule": "0:0.9,1:0.5"}, "can only rise"),
        ({"sparsity_schedule": "0.1,0.9,3,cubic"}, "starts at sparsity 0.1, but the model is 60"),
        ({"sparsity_schedule": "0:0.9"}, "in epochs but the run is in --max_steps"),
        ({"sparsity_schedule": "0.65,0.9,20,cubic"}, "twice at optimizer step"),
        ({"augmentation": "mighty"}, "none, flip, light, medium, heavy"),
        ({"ema_decay": 1.0}, "not between 0 and 1"),
        ({"cycle_peak_decay": 0.0}, r"not in \(0, 1\]"),
        ({"cycle_end_lr": 1.0, "learning_rate": 0.5}, "cycle_end_lr=1.0 is not between 0 and learning_rate=0.5"),
        ({"cycle_end_lr": 1e-9}, "--cycle_end_lr is for the linear decay that restarts at pruning steps"),
        ({"distillation_temperature": 0.0}, "greater than 0"),
        ({"hidden_state_weight": -1.0}, "0 or greater"),
        ({"feature_weight": float("nan")}, "feature_weight=nan must be 0 or greater, and finite"),
        ({"max_steps": 0}, "max_steps=0 trains nothing: `cap-hf evaluate`"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0 trains nothing"),
        ({"max_steps": -1, "num_train_epochs": float("nan")}, "num_train_epochs=nan trains nothing"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be 0 or greater"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be 0 or greater"),
        ({"label_smoothing_factor": 2.0}, r"label_smoothing_factor=2.0 is not in \[0, 1\)"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be 0 or greater"),
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


def test_a_report_gets_what_is_not_the_default_and_no_secret(tmp_path):
    args = SparseTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, ema_decay=0.5, hub_token="secret", learning_rate=3e-4, max_steps=7
    )
    changed = args.changed()
    assert {name: changed[name] for name in ("ema_decay", "learning_rate", "max_steps", "use_cpu")} == {
        "ema_decay": 0.5,
        "learning_rate": 3e-4,
        "max_steps": 7,
        "use_cpu": True,
    }
    assert not {"output_dir", "hub_token", "augmentation", "weight_decay"} & set(changed)
    assert "secret" not in str(changed)


@pytest.mark.parametrize(
    ("changes", "cyclic"),
    [
        ({}, False),
        ({"sparsity_schedule": "0.5"}, True),
        ({"sparsity_schedule": "0.5", "restart_lr": False}, False),
        ({"sparsity_schedule": "0.5", "lr_scheduler_type": "cosine"}, False),
    ],
)
def test_the_learning_rate_restarts_only_where_it_decays_linearly(tmp_path, changes, cyclic):
    assert SparseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes).cyclic_lr == cyclic


def test_bfloat16_without_an_accelerator_is_for_the_cpu(tmp_path, monkeypatch):
    """transformers refuses it unless it is told so, in words that name none of the command's arguments."""
    for name in ("bf16", "bf16_full_eval"):
        monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
        assert SparseTrainingArguments(output_dir=str(tmp_path), **{name: True}).use_cpu
        assert not SparseTrainingArguments(output_dir=str(tmp_path)).use_cpu
        # Where there is one it is trained on, and what it can is transformers' to say.
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
        with pytest.raises(ValueError, match="use_cpu"):
            SparseTrainingArguments(output_dir=str(tmp_path), **{name: True})
