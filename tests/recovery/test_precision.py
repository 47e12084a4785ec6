"""bfloat16 is measured before it is trained in; a pruning step in such a run computes in float32."""

import math

import pytest
import torch
from support.recovery import make_trainer, sparse_vit, tiny_vit

from cap_hf.errors import CAPError
from cap_hf.recovery.precision import bfloat16_ratio, check_bfloat16


@pytest.fixture
def measured(monkeypatch):
    """Set what the measurement gives; returns how often it was asked."""
    calls = []

    def set_ratio(ratio):
        monkeypatch.setattr("cap_hf.recovery.precision.bfloat16_ratio", lambda: calls.append(ratio) or ratio)
        return calls

    return set_ratio


def test_a_real_measurement_is_a_ratio():
    ratio = bfloat16_ratio()
    assert math.isfinite(ratio)
    assert 0.001 < ratio < 10_000


@pytest.mark.parametrize("ratio", [0.4, 1.0, 1.05])
def test_a_processor_that_is_fast_in_bfloat16_is_not_spoken_of(measured, caplog, ratio):
    measured(ratio)
    check_bfloat16(["--bf16"])
    assert not caplog.records


def test_slower_is_said_in_one_line_with_the_ratio_and_what_to_do(measured, caplog):
    measured(2.5)
    check_bfloat16(["--bf16", "--teacher_bf16"])
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("bfloat16 takes this processor 2.5 times as long as float32: leave out --bf16 and --teac")
    assert "\n" not in message


def test_far_slower_is_refused_before_training(tmp_path, measured):
    measured(15.6)
    with pytest.raises(CAPError, match=r"15\.6 times as long as float32: leave out --bf16 \(fast") as caught:
        make_trainer(tmp_path, sparse_vit(), bf16=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(CAPError, match=r"leave out --teacher_bf16 \(fast"):
        make_trainer(tmp_path, sparse_vit(), teacher=tiny_vit(1), teacher_bf16=True)


def test_only_who_asks_for_bfloat16_waits_for_the_measurement(tmp_path, measured):
    calls = measured(1.0)
    make_trainer(tmp_path, sparse_vit(), teacher=tiny_vit(1))
    make_trainer(tmp_path, sparse_vit(), teacher_bf16=True)  # there is no teacher to run in it
    assert not calls
    make_trainer(tmp_path, sparse_vit(), bf16=True)
    assert len(calls) == 1


def test_a_pruning_step_within_a_bfloat16_run_computes_in_float32(tmp_path):
    """The zeros of a run in bfloat16 that prunes before its first step are those of one in float32."""
    models = []
    for bf16 in (False, True):
        model = tiny_vit()
        make_trainer(tmp_path, model, sparsity_schedule="0.5", max_steps=1, learning_rate=0.0, bf16=bf16).train()
        models.append(model)
    for own, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(own, other)
