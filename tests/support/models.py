"""Small models of every architecture, built from their configs; nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import set_seed

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 10,
}

# Class name, config, image side.
ARCHITECTURES = {
    "ViT": ({**TINY_VIT, "num_channels": 3}, 8),
    "DeiT": ({**TINY_VIT, "num_channels": 3}, 8),
    "Dinov2": ({**TINY_VIT, "num_channels": 3, "use_swiglu_ffn": True}, 8),
    "Swin": (
        {"depths": [2, 1], "num_heads": [2, 2], "embed_dim": 8, "image_size": 16, "patch_size": 2, "window_size": 4},
        16,
    ),
    "ConvNext": ({"depths": [1, 1, 1, 1], "hidden_sizes": [4, 8, 8, 8], "num_stages": 4}, 32),
    "ResNet": ({"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 4, "layer_type": "basic"}, 16),
}


def build(name: str, **changes) -> transformers.PreTrainedModel:
    """A randomly initialised image classifier with 10 classes, in eval mode."""
    set_seed(0)
    kwargs, _ = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**{**kwargs, "num_labels": 10, **changes})
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    # Initialisations near 0 (ConvNeXt's layer scale, heads) would leave gradients too small to compare.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def random_batches(model, side: int, sizes=(4, 4), seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of random pixels and labels that fit a model."""
    generator = torch.Generator().manual_seed(seed)
    channels = model.config.num_channels
    return [
        {
            "pixel_values": torch.randn(size, channels, side, side, generator=generator, dtype=model.dtype),
            "labels": torch.randint(0, model.config.num_labels, (size,), generator=generator),
        }
        for size in sizes
    ]
