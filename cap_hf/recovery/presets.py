"""Defaults of a training that belong together under one name; what is given explicitly goes before them.

Imports nothing heavy, so that a command can name them before torch is there.
"""

from collections.abc import Mapping
from typing import Any

# Healing: a few hundred steps towards what the dense model makes of images without labels (STARFISH, arXiv 2606.01126).
# The mean over the hidden states of their error relative to their size, and the divergence of the logits as they are;
# the optimizer is AdamW, as everywhere. Rate and weight are measured (docs/results.md): with weights of 1 nearly all of
# the gradient is the logits', which learn no better for it, while the states get worse.
HEAL: dict[str, Any] = {
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "hard_label_weight": 0.0,
    "distillation_weight": 1.0,
    "distillation_temperature": 1.0,
    "feature_weight": 50.0,
    "hidden_state_weight": 50.0,
    "augmentation": "flip",
    "freeze_outside": True,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 50,
}
# By name, what fields of SparseTrainingArguments are set to.
TRAINING_PRESETS = {"heal": HEAL}
# Beside the first, which a preset does not set, the second would leave it without effect.
WITHOUT = {"num_train_epochs": "max_steps", "save_steps": "save_strategy"}


def defaults_beside(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that take the place of the usual ones: those of the preset that was given, if one was.

    Args:
        given: the arguments that were given explicitly, by name; what they say of `preset` names it.
    """
    replaced = {other for name, other in WITHOUT.items() if name in given}
    preset = TRAINING_PRESETS.get(given.get("preset") or "", {})
    return {name: value for name, value in preset.items() if name not in replaced}
