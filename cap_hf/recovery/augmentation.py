"""Augment batches, from not at all to what dense vision transformers are trained with; all but flips with kornia."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cap_hf.errors import CAPError
from cap_hf.extras import need
from cap_hf.recovery.losses import label_shares


@dataclass(frozen=True)
class AugmentationPreset:
    """How strong each part is; a probability or size of 0 leaves it out.

    Attributes:
        min_crop: smallest share of the image's area that a random crop keeps; 1 crops nothing.
        flip: probability of a horizontal flip.
        operations: RandAugment's operations per batch (arXiv 1909.13719).
        magnitude: of those, in (0, 30).
        mixup: probability that a batch is mixed up (arXiv 1710.09412).
        cutmix: probability that a batch is cut and mixed instead (arXiv 1905.04899); never both.
        erasing: probability that a part of an image is erased (arXiv 1708.04896).
        label_smoothing: share of the labels spread over all classes.
    """

    min_crop: float = 1.0
    flip: float = 0.0
    operations: int = 0
    magnitude: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    label_smoothing: float = 0.0


# Sparse vision transformers have less to regularise and recover better with less of it (arXiv 2210.09223, section
# on augmentation); heavy is what DeiT trains dense models with.
PRESETS = {
    "none": AugmentationPreset(),
    "flip": AugmentationPreset(flip=0.5),
    "light": AugmentationPreset(min_crop=0.8, flip=0.5, operations=1, magnitude=5),
    "medium": AugmentationPreset(
        min_crop=0.5, flip=0.5, operations=2, magnitude=7, mixup=0.2, cutmix=0.2, erasing=0.1, label_smoothing=0.05
    ),
    "heavy": AugmentationPreset(
        min_crop=0.08, flip=0.5, operations=2, magnitude=9, mixup=0.5, cutmix=0.5, erasing=0.25, label_smoothing=0.1
    ),
}


class RandomFlip(nn.Module):
    """Mirrors each image of a batch with a probability, and leaves labels alone; other than kornia's it needs nothing.

    It draws from torch's global generator, on the CPU, so a resumed run goes on as it would have.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `pixel_values (b, channels, h, w)`, some of them mirrored, and the labels."""
        mirrored = (torch.rand(len(pixel_values)) < self.probability).to(pixel_values.device)
        return torch.where(mirrored[:, None, None, None], pixel_values.flip(-1), pixel_values), labels


class BatchAugmentation(nn.Module):
    """Augments a batch of a model's inputs, on the device where they are.

    It draws from torch's global generator, on the CPU, so a resumed run goes on as it would have.

    Args:
        preset: how strong.
        image_processor: the model's: its mean and standard deviation, because kornia wants pixels in [0, 1].
        num_labels: classes, for mixed labels; 0 of a model without a head.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preset: AugmentationPreset, image_processor: Any, num_labels: int) -> None:
        super().__init__()
        self.preset, self.num_labels = preset, num_labels
        # kornia takes seconds to import; a run without augmentation does not wait for it.
        need("kornia", "recovery")
        from kornia.augmentation import RandomCutMixV2, RandomErasing, RandomHorizontalFlip, RandomMixUpV2

        mean, std = pixel_statistics(image_processor)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.flip = RandomHorizontalFlip(p=preset.flip) if preset.flip else None
        self.erasing = RandomErasing(p=preset.erasing) if preset.erasing else None
        self.mixup = RandomMixUpV2(data_keys=["input", "class"]) if preset.mixup else None
        self.cutmix = None
        if preset.cutmix:
            self.cutmix = RandomCutMixV2(use_correct_lambda=True, data_keys=["input", "class"])
        # Made at the first batch, for its size and channels.
        self.crop: nn.Module | None = None
        self.rand_augment: nn.Module | None = None

    @torch.no_grad()
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return augmented `pixel_values (b, channels, h, w)`, and `labels (b,)` as shares `(b, classes)`.

        A label of -100 is none: its shares are 0. Without labels, or classes, images are augmented alone, never mixed.
        """
        dtype = pixel_values.dtype
        images = (pixel_values.float() * self.std + self.mean).clamp(0, 1)
        if self.crop is None and self.rand_augment is None:
            self._make_spatial(images)
        for augment in (self.crop, self.flip, self.rand_augment, self.erasing):
            if augment is not None:
                images = augment(images)
        targets = None
        if labels is not None and self.num_labels:
            images, targets = self._mix(images, labels)
        return ((images.clamp(0, 1) - self.mean) / self.std).to(dtype), targets

    def _make_spatial(self, images: torch.Tensor) -> None:
        from kornia.augmentation import RandomResizedCrop
        from kornia.augmentation.auto import RandAugment
        from kornia.augmentation.auto.rand_augment.rand_augment import default_policy

        if self.preset.min_crop < 1:
            height, width = images.shape[-2:]
            self.crop = RandomResizedCrop((height, width), scale=(self.preset.min_crop, 1.0))
        if self.preset.operations:
            # Saturation is the one operation that needs colours.
            policy = [each for each in default_policy if images.shape[1] == 3 or each[0][0] != "color"]
            self.rand_augment = RandAugment(self.preset.operations, self.preset.magnitude, policy)

    def _mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        draw = float(torch.rand(())) if self.mixup or self.cutmix else 1.0
        if self.mixup is not None and draw < self.preset.mixup:
            images, mixed = self.mixup(images, labels)
        elif self.cutmix is not None and draw < self.preset.mixup + self.preset.cutmix:
            images, mixed = self.cutmix(images, labels)
            # kornia gives the first label's share here, where its mixup gives the second's.
            mixed = torch.stack([*mixed.reshape(-1, 3).unbind(dim=1)[:2], 1 - mixed.reshape(-1, 3)[:, 2]], dim=1)
        else:
            return images, label_shares(labels, self.num_labels)
        own, other, share = mixed.unbind(dim=1)
        first, second = (label_shares(each.long(), self.num_labels) for each in (own, other))
        return images, torch.lerp(first, second, share[:, None].float())


def pixel_statistics(image_processor: Any) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, by channel, that turn pixel values back into images in [0, 1]."""
    normalized = getattr(image_processor, "do_normalize", False)
    mean = list(image_processor.image_mean) if normalized else [0.0]
    std = list(image_processor.image_std) if normalized else [1.0]
    # Without rescaling images stay in [0, 255].
    scale = 1.0 if getattr(image_processor, "do_rescale", True) else 255.0
    return [each / scale for each in mean], [each / scale for each in std]


def make_augmentation(
    name: str, image_processor: Any, num_labels: int, flip: bool = True
) -> BatchAugmentation | RandomFlip | None:
    """Return the augmentation of a preset's name; None where it changes nothing.

    Args:
        name: one of `PRESETS`.
        image_processor: the model's; flips alone need none.
        num_labels: of the model; 0 where it has no head.
        flip: False where a mirrored image means something else, as with digits.

    Raises:
        CAPError: there is no such preset, or no image processor where one is needed.
    """
    if name not in PRESETS:
        raise CAPError(f"augmentation={name!r} is not one of {', '.join(PRESETS)}")
    preset = PRESETS[name] if flip else replace(PRESETS[name], flip=0.0)
    if preset == AugmentationPreset():
        return None
    if preset == AugmentationPreset(flip=preset.flip):
        return RandomFlip(preset.flip)
    if image_processor is None:
        raise CAPError("augmentation needs the image processor: pass it as processing_class")
    return BatchAugmentation(preset, image_processor, num_labels)
