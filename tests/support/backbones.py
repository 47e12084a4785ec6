"""Small models without a head, and one that also reads text."""

import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, set_seed

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 3}


def tiny_dinov2(**changes) -> Dinov2Model:
    """Return a DINOv2 without a head, in eval mode, far enough from its initialisation for gradients everywhere."""
    set_seed(0)
    sizes = TINY | IMAGE | {"mlp_ratio": 2, "num_hidden_layers": 2}
    return moved(Dinov2Model(Dinov2Config(**(sizes | changes))))


def tiny_clip() -> CLIPModel:
    """Return a whole CLIP, a vision and a text tower, in eval mode."""
    set_seed(0)
    text = TINY | {"vocab_size": 50, "max_position_embeddings": 8, "projection_dim": 8}
    vision = TINY | IMAGE | {"projection_dim": 8}
    return moved(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)))


def moved(model):
    """Return a model in eval mode whose parameters were moved by a tenth."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
