"""Attention of transformers models in int8, as one of the implementations that transformers knows by name."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cap_hf.inference.choice import MARGIN, RUNS, SECONDS, time_in_turns
from cap_hf.inference.operators import int8_attention
from cap_hf.models import uncompiled
from cap_hf.towers import see, tower_of

# What `config._attn_implementation` is called; configs are saved without it.
NAME = "cap_hf_int8"
MOST_KEYS = 32768  # that the kernel takes


def int8_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention `(images, queries, heads, cols)` as transformers calls it.

    In int8 where every query sees every key, which is what images need; PyTorch's own elsewhere, as with a mask.

    Args:
        module: the layer of attention.
        query: `(images, heads, queries, cols)`.
        key, value: `(images, heads, keys, cols)`.
        attention_mask: None if there is none.
        dropout: as of PyTorch's.
        scaling: what scores are multiplied by; None for `1 / sqrt(cols)`.
        is_causal: None for what the module says.
        kwargs: passed on where PyTorch's own is called.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (
        attention_mask is None
        and not causal
        and not dropout
        # What else changes attention, such as a position bias or a cap of the scores.
        and not any(isinstance(each, torch.Tensor) for each in kwargs.values())
        and kwargs.get("softcap") is None
        and query.shape[1] == key.shape[1]
        and key.shape == value.shape
        and 0 < key.shape[2] <= MOST_KEYS
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and isinstance(scale, float)
        and scale > 0
    ):
        return int8_attention(query, key, value, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
    )


AttentionInterface.register(NAME, int8_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the configs by which parts of a model choose PyTorch's attention, each once."""
    modules = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(module.config): module.config for module in modules if module._can_set_attn_implementation()}
    return [config for config in configs.values() if config._attn_implementation == "sdpa"]


def choose(config: PreTrainedConfig, name: str) -> None:
    """Set what a config chooses, and not what configs inside it do, as its public attribute would."""
    config._attn_implementation_internal = name


def speed_up_attention(model: nn.Module, example: Mapping[str, torch.Tensor]) -> None:
    """Compute the attention of what sees images in int8, if the model is measured to be faster with it on an example.

    The config that says so is then the model's own: others may have been made of the one it had.
    """
    tower = tower_of(model)
    configs = configs_of(tower)
    if not configs:
        return

    def call(name: str) -> None:
        for config in configs:
            choose(config, name)
        with uncompiled(model), torch.inference_mode():
            see(model, example)

    try:
        with Seen() as seen:
            call(NAME)
        if not seen.int8_attention:
            return
        names = ("sdpa", NAME)
        times = time_in_turns([functools.partial(call, name) for name in names], RUNS, SECONDS)
    finally:
        for config in configs:
            choose(config, "sdpa")
    before, after = (min(each) for each in times)
    if after >= MARGIN * before:
        return
    own: dict[int, PreTrainedConfig] = {}
    holder: Any
    for holder in tower.modules():
        held = getattr(holder, "config", None)
        if isinstance(held, PreTrainedConfig):
            holder.config = own.setdefault(id(held), copy.copy(held))
    for each in configs:
        choose(own[id(each)], NAME)


class Seen(TorchDispatchMode):
    """Sees whether attention runs in int8 while it is entered: masks and the like may prevent it."""

    int8_attention = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.int8_attention |= func is torch.ops.cap_hf.int8_attention.default
        return func(*args, **(kwargs or {}))
