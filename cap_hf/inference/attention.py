"""Attention of transformers models in int8, as one of the implementations that transformers knows by name."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cap_hf.inference.operators import int8_attention

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
