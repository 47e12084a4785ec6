"""A masked autoencoder that masks nothing, so that what it makes of an image is of all of it, in order."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def unmasked(tower: nn.Module) -> Iterator[Any]:
    """Have a masked autoencoder mask nothing; yield what makes the noise by which it sorts patches, or None."""
    config = getattr(tower, "config", None)
    # Some modules have a copy of the config's ratio.
    holders: list[Any] = [each for each in (config, *tower.modules()) if "mask_ratio" in getattr(each, "__dict__", {})]
    before = [each.mask_ratio for each in holders]
    sorts = "noise" in inspect.signature(tower.forward).parameters and hasattr(
        getattr(tower, "embeddings", None), "random_masking"
    )
    if config is None or not holders:
        yield None
        return

    def rising(pixels: torch.Tensor) -> torch.Tensor:
        patch = config.patch_size
        number = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        return torch.arange(number, device=pixels.device, dtype=torch.float32).expand(pixels.shape[0], -1)

    for each in holders:
        each.mask_ratio = 0.0
    try:
        yield rising if sorts else None
    finally:
        for each, ratio in zip(holders, before, strict=True):
            each.mask_ratio = ratio
