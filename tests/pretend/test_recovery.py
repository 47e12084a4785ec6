"""Recovery on the accelerator: the steps it takes on the CPU, masks held, and a run that goes on."""

import pytest
import torch
from support import pretend
from support.recovery import GRADUAL, assert_same_zeros, make_trainer, sparse_vit, tiny_vit, zeros

from cap_hf.recovery.callbacks import isolated_random_state

# A teacher on logits and hidden states, masks, and an average of the weights. AdamW would make a step of the rounding
# of gradients that are 0.
EVERYTHING = {
    "optim": "sgd",
    "max_steps": 2,
    "distillation_weight": 1.0,
    "hidden_state_weight": 1.0,
    "ema_decay": 0.8,
}


def train(folder, device, model, resume=None, **changes):
    pretend.choose(device)
    trainer = make_trainer(folder, model, use_cpu=device == "cpu", **changes)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.model.device.type == trainer.args.device.type == device
    return trainer


def test_recovery_with_a_teacher_gives_what_the_cpu_gives(tmp_path):
    expected = zeros(sparse_vit())
    found = {}
    for device in ("cpu", "pretend"):
        trainer = train(tmp_path / device, device, sparse_vit(), teacher=tiny_vit(seed=1), **EVERYTHING)
        found[device] = {"loss": torch.tensor(trainer.evaluate()["eval_loss"])}
        assert_same_zeros(trainer.model.cpu(), expected)
        found[device] |= trainer.model.state_dict()
    for name, weight in found["cpu"].items():
        torch.testing.assert_close(found["pretend"][name], weight, rtol=1e-3, atol=1e-4)


def test_gradual_pruning_gives_the_sparsity_of_the_cpu(tmp_path):
    changes = {**GRADUAL, "augmentation": "none", "max_steps": 6}
    on_cpu, on_device = (train(tmp_path / device, device, tiny_vit(), **changes).model for device in ("cpu", "pretend"))
    counts = [sum(int(zero.sum()) for zero in zeros(model).values()) for model in (on_cpu, on_device)]
    assert counts[0] == counts[1] > 0


def test_augmentation_happens_on_the_accelerator(tmp_path):
    trainer = train(tmp_path, "pretend", sparse_vit(), max_steps=2, augmentation="medium")
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert_same_zeros(trainer.model.cpu(), zeros(sparse_vit()))


@pytest.mark.parametrize("changes", [{"bf16": True}, {"optim": "adamw_torch"}, {"dataloader_pin_memory": True}])
def test_what_runs_on_gpus_are_given(tmp_path, changes):
    trainer = train(tmp_path, "pretend", sparse_vit(), teacher=tiny_vit(seed=1), **{**EVERYTHING, **changes})
    assert_same_zeros(trainer.model.cpu(), zeros(sparse_vit()))


def test_an_interrupted_run_goes_on(tmp_path):
    # Without augmentation: of the generators of devices that it does not know, the Trainer keeps no state.
    changes = {**GRADUAL, "augmentation": "none"}
    expected = train(tmp_path, "pretend", tiny_vit(), **changes).model.cpu()
    found = train(tmp_path, "pretend", tiny_vit(), str(tmp_path / "checkpoint-6"), **changes).model.cpu()
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, msg=lambda text, name=name: f"{name}: {text}")


def test_pruning_steps_draw_nothing_from_the_generator_of_the_accelerator():
    torch.manual_seed(0)
    expected = torch.randn(4, device="pretend")
    torch.manual_seed(0)
    with isolated_random_state(torch.device("pretend")):
        torch.randn(4, device="pretend")
    assert torch.equal(torch.randn(4, device="pretend"), expected)
