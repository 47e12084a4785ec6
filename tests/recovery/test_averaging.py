"""The average of the weights: what it is, and that it is what a run evaluates, saves and ends with."""

import pytest
import torch
from support.recovery import assert_same_zeros, examples, make_trainer, sparse_vit, tiny_vit, zeros
from transformers import TrainerCallback

from cap_hf.data.images import collate
from cap_hf.errors import CAPError
from cap_hf.recovery.averaging import WeightAverage


def test_the_average_is_the_result_and_what_is_evaluated(tmp_path):
    weights = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            weights.append(model.classifier.weight.detach().clone())

    model = sparse_vit()
    trainer = make_trainer(tmp_path, model, callbacks=[Record()], ema_decay=0.5, max_steps=4, save_steps=2)
    trainer.train()
    average = weights[0]
    for weight in weights[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(model.classifier.weight.detach(), average)
    with torch.no_grad():
        logits = model.eval()(pixel_values=collate(examples(16))["pixel_values"]).logits
    torch.testing.assert_close(torch.from_numpy(trainer.predict(examples(16)).predictions), logits)


def test_a_violated_mask_of_the_average_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, sparse_vit(), ema_decay=0.5)
    trainer.average.update(trainer.model)
    with torch.no_grad():
        trainer.average.model.vit.layers[0].mlp.fc1.weight.fill_(1.0)
    with pytest.raises(CAPError, match="no longer 0"):
        trainer.save_model()


def test_the_average_is_exponential_from_its_first_update_and_begins_anew():
    model = tiny_vit()
    average, weight = WeightAverage(model, decay=0.75), model.classifier.weight
    assert not average.started
    for start in (1.0, -2.0):
        average.restart()
        expected = None
        for step in range(4):
            with torch.no_grad():
                weight.fill_(start + step)
            average.update(model)
            expected = start if expected is None else 0.75 * expected + 0.25 * (start + step)
            torch.testing.assert_close(average.model.classifier.weight, torch.full_like(weight, expected))
        assert average.started
    assert not average.model.classifier.weight.requires_grad


def test_what_is_applied_is_taken_back_whatever_happens():
    model = sparse_vit()
    average = WeightAverage(model, decay=0.5)
    with average.applied(model):  # none yet
        pass
    average.update(model)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    before = zeros(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with pytest.raises(KeyboardInterrupt), average.applied(model):
        assert torch.equal(model.classifier.weight, own["classifier.weight"])
        assert_same_zeros(model, before)
        raise KeyboardInterrupt
    assert torch.equal(model.classifier.weight, 2 * own["classifier.weight"])


def test_the_average_goes_to_a_folder_and_back(tmp_path):
    model, other = tiny_vit(), tiny_vit(1)
    average, back = WeightAverage(model, decay=0.5), WeightAverage(other, decay=0.5)
    average.update(model)
    average.save(tmp_path)
    back.load(tmp_path / "nowhere")  # a checkpoint without one
    assert not back.started
    back.load(tmp_path)
    assert back.started
    assert torch.equal(back.model.classifier.weight, model.classifier.weight)


def test_an_average_that_is_damaged_is_one_line(tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CAPError, match=r"ema\.safetensors cannot be loaded: ") as caught:
        WeightAverage(tiny_vit(), decay=0.5).load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_push_in_the_middle_of_a_run_saves_the_model_without_a_state_to_resume_from(tmp_path):
    trainer = make_trainer(tmp_path, sparse_vit(), ema_decay=0.5)
    trainer.average.update(trainer.model)
    trainer.save_model(_internal_call=True)  # as Trainer.push_to_hub calls it
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "ema.safetensors").exists()


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_whole_numbers_are_taken_as_they_are(decay):
    """An average of 3 and 3 that is 2.9999 would become 2, and a position another one."""
    model = torch.nn.Linear(1, 1)
    model.register_buffer("position_ids", torch.arange(600))
    average = WeightAverage(model, decay)
    for _ in range(3):
        average.update(model)
    assert torch.equal(average.model.position_ids, torch.arange(600))
