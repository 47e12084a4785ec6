"""Models with random weights, and images of noise: what the benchmarks measure does not depend on what is learnt."""

import torch
from transformers import ViTConfig, ViTForImageClassification, set_seed

# Vision transformers of patches of 16 x 16 pixels, and one small enough for a test.
VITS = {
    "vit-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "vit-small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "vit-test": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 8,
    },
}


def make_vit(name: str, **changes: object) -> ViTForImageClassification:
    """Return one of `VITS` for 224 x 224 pixels and 1,000 labels, in eval mode; `changes` go to its config."""
    set_seed(0)
    return ViTForImageClassification(ViTConfig(**{"num_labels": 1000, **VITS[name], **changes})).eval()


def make_batches(examples: int, batch_size: int, side: int = 224, labels: int = 1000) -> list[dict[str, torch.Tensor]]:
    """Return batches of random images of `side` x `side` pixels, and labels."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(batch_size, 3, side, side, generator=generator),
            "labels": torch.randint(0, labels, (batch_size,), generator=generator),
        }
        for _ in range(examples // batch_size)
    ]
