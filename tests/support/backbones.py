"""Small models without a head, and one that also reads text."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

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


def tiny_convnext() -> ConvNextModel:
    """Return a convolutional backbone for images of 32 pixels, in eval mode."""
    set_seed(0)
    return moved(ConvNextModel(ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2)))


def tiny_mae() -> ViTMAEForPreTraining:
    """Return a masked autoencoder with its decoder, in eval mode."""
    set_seed(0)
    sizes = {f"decoder_{name}": value for name, value in TINY.items()}
    return moved(ViTMAEForPreTraining(ViTMAEConfig(**TINY, **IMAGE, **sizes)))


def backbone_checkpoint(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Save a model, by default a DINOv2 for the digits, and an image processor for its 8x8 images."""
    model = tiny_dinov2(num_channels=1, patch_size=2) if model is None else model
    model.save_pretrained(folder)
    mean = [0.5] * getattr(model.config, "num_channels", 3)
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=mean, image_std=mean, do_convert_rgb=False
    ).save_pretrained(folder)
    return folder


def clip_checkpoint(folder: Path) -> CLIPModel:
    """Save a whole CLIP with its image processor and its tokenizer, as they come from the Hub; return the model."""
    model = tiny_clip()
    backbone_checkpoint(folder, model)
    letters = {"<|startoftext|>": 48, "<|endoftext|>": 49, "a</w>": 0, "b</w>": 1}
    tokenizer = CLIPTokenizer(vocab=letters, merges=[])
    CLIPProcessor(ViTImageProcessorPil.from_pretrained(folder), tokenizer).save_pretrained(folder)
    return model
