"""Examples of a split as the model's inputs."""

import logging
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor, PretrainedConfig

from cap_hf.data.arguments import DataArguments
from cap_hf.data.labels import LabelNumbers, find_columns
from cap_hf.data.pictures import read_picture
from cap_hf.data.workers import num_workers
from cap_hf.errors import CAPError, reason
from cap_hf.notices import warn_once
from cap_hf.targets import summarize
from cap_hf.towers import channels_in

logger = logging.getLogger(__name__)

# Grey levels, of 255, by which images differ that are not all but one colour; what an image processor makes of them
# differs by more than the second, and hardly ever is as far from 0 as the third.
CONTRAST, FLAT, FAR = 32, 0.05, 20.0


class ImageDataset(Dataset):
    """A split of `datasets` as the model's inputs: `pixel_values` from its own image processor, and `labels` if any.

    Args:
        split: with a column of images and, for labels, one of labels.
        image_processor: the model's.
        config: the model's, for its labels and number of channels.
        args: the names of the columns, and the value of white.
        has_head: whether the model's classes are those of its config; without, labels are the dataset's own numbers.
        channels: of the images that the model takes, 0 where that is not known; None for what the config itself says,
            which a composite one does not.

    Attributes:
        labelled: whether batches have `labels`, because there is a column of labels.

    Raises:
        CAPError: a column is missing or its classes are not the model's; from `__getitems__`: an image is unreadable,
            or the image processor cannot take it or does not make of it what the model takes, or its label is none of
            the classes.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        image_processor: BaseImageProcessor,
        config: PretrainedConfig,
        args: DataArguments,
        has_head: bool = True,
        channels: int | None = None,
    ) -> None:
        self.image_column, self.label_column = find_columns(split.features, args)
        self.numbers = None
        if self.label_column is not None:
            self.numbers = LabelNumbers(split, self.label_column, config if has_head else None)
        self.columns = list(split.features)
        others = [column for column in self.columns if column != self.image_column]
        if has_head and not self.labelled and others:
            warn_once(
                logger,
                f"There is no column of labels among {summarize(self.columns)}: the images are taken as unlabelled; "
                "name one with --label_column_name if it holds labels",
            )
        # Images are decoded here, one by one, so that a broken file can be named.
        self.rows = split.select_columns([name for name in (self.image_column, self.label_column) if name]).cast_column(
            self.image_column, datasets.Image(decode=False)
        )
        self.white_level = args.white_level
        self.image_processor = image_processor
        self.channels = channels_in([config]) if channels is None else channels
        self.mode = "L" if self.channels == 1 else "RGB"

    @property
    def labelled(self) -> bool:
        """Return whether there is a column of labels."""
        return self.numbers is not None

    def need_labels(self, otherwise: str = "") -> "ImageDataset":
        """Return the dataset itself, for a caller that cannot do without labels.

        Args:
            otherwise: what else to do where there are none, for the error.

        Raises:
            CAPError: there are none.
        """
        if not self.labelled:
            raise CAPError(
                f"there is no column of labels among {summarize(self.columns)}: name one with --label_column_name, or "
                f"put the images of each class into a folder of their own{otherwise and f', or {otherwise}'}"
            )
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """Return the decoded image of an example."""
        return self._decode(index, self.rows[index][self.image_column])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        indices = list(indices)
        rows = self.rows[indices]
        values = rows[self.image_column]
        images = [self._decode(index, value) for index, value in zip(indices, values, strict=True)]
        names = [f"image {index} ({self._place(value)})" for index, value in zip(indices, values, strict=True)]
        examples = self._process(images, names)
        if self.numbers is not None:
            examples["labels"] = torch.from_numpy(self.numbers(rows[self.label_column], indices))
        return [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]

    def _process(self, images: list[Image.Image], names: list[str]) -> dict[str, torch.Tensor]:
        """Return what the image processor makes of images, `(n, ...)` each: pixels, and masks and sizes if any."""
        try:
            # What is divided by 0 is found below.
            with np.errstate(all="ignore"):
                made = self.image_processor(images=images, return_tensors="pt")
        except Exception as error:  # each image processor has its own
            raise self._misfit(images, names, error) from error
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        examples = {name: value for name, value in tensors.items() if value.dim() and len(value) == len(images)}
        kind, pixels = type(self.image_processor).__name__, examples.get("pixel_values")
        if pixels is None:
            raise CAPError(f"{kind} makes no pixel_values of each image, but {summarize(list(made))}")
        if pixels.dim() == 4 and self.channels and pixels.shape[1] != self.channels:
            raise CAPError(
                f"{kind} makes images of {pixels.shape[1]} channels ({_size(pixels)} pixels) and the model takes "
                f"{self.channels}: look at do_convert_rgb and data_format in preprocessor_config.json"
            )
        if pixels.is_floating_point() and not pixels.isfinite().all():
            raise CAPError(f"{kind} makes pixels that are no numbers: look at image_std in preprocessor_config.json")
        check_contrast(kind, images, pixels)
        return examples

    def _misfit(self, images: list[Image.Image], names: list[str], error: Exception) -> CAPError:
        """Return what is wrong where the image processor refuses images: something of one of them, or their sizes."""
        kind = type(self.image_processor).__name__
        sizes: dict[str, str] = {}
        for image, name in zip(images, names, strict=True):
            try:
                made = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            except Exception as alone:
                size, why = f"{image.height}x{image.width} pixels", reason(alone).rstrip(".")
                return CAPError(f"{kind} cannot take {name} of {size}: {why}: look at preprocessor_config.json")
            sizes.setdefault(_size(made), name)
        if len(sizes) < 2:
            return CAPError(f"{kind} cannot take {summarize(names, 2)}: {reason(error)}")
        (one, first), (two, second), *_ = sizes.items()
        return CAPError(
            f"{kind} makes {first} {one} pixels and {second} {two}, which do not fit into one batch: set do_resize and "
            "size in preprocessor_config.json, as the model was trained"
        )

    def _decode(self, index: int, value: dict | None) -> Image.Image:
        try:
            return read_picture(value, self.white_level).convert(self.mode)
        except Exception as error:  # PIL and the file system raise many kinds
            raise CAPError(f"image {index} ({self._place(value)}) cannot be read: {reason(error)}") from error

    def _place(self, value: dict | None) -> str:
        return (value or {}).get("path") or f"column {self.image_column!r}"


def check_contrast(kind: str, images: list[Image.Image], pixels: torch.Tensor) -> None:
    """Look at how dark and light the pixels are that an image processor makes.

    Args:
        kind: of the image processor.
        images: what it was given.
        pixels: what it made of them, `(n, ...)`.

    Raises:
        CAPError: images of some contrast have lost nearly all of it.
    """
    low, high = pixels.min().item(), pixels.max().item()
    where = "look at do_rescale, rescale_factor, image_mean and image_std in preprocessor_config.json"
    if high - low < FLAT and contrast(images) >= CONTRAST:
        raise CAPError(f"{kind} makes pixels from {low:.3g} to {high:.3g}, which are all but the same: {where}")
    if max(-low, high) > FAR:
        warn_once(
            logger,
            f"{kind} makes pixels beyond {FAR:g}, where most models are trained on -3 to 3: {where}, unless this one "
            "was trained so",
        )


def contrast(images: list[Image.Image]) -> int:
    """Return how far the darkest and the lightest pixel of all images are apart, in grey levels from 0 to 255."""
    bounds = [int(bound) for image in images for bound in np.asarray(image.convert("L").getextrema())]
    return max(bounds) - min(bounds)


def _size(pixels: torch.Tensor) -> str:
    return "x".join(map(str, pixels.shape[-2:]))


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack examples into a batch.

    Raises:
        CAPError: they are not of one size.
    """
    batch = {}
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        other = next((value for value in values if value.shape != first.shape), None)
        if other is not None:
            raise CAPError(
                f"{name} of one batch are {tuple(first.shape)} and {tuple(other.shape)}: set do_resize and size in "
                "preprocessor_config.json, or take one example at a time"
            )
        batch[name] = torch.stack(values)
    return batch


def make_dataloader(
    dataset: Dataset, batch_size: int, wish: int | None = None, device: torch.device | None = None
) -> DataLoader:
    """Batches in the dataset's order, in memory that CUDA copies from while it computes where they go there.

    Args:
        dataset: of examples that `collate` takes.
        batch_size: examples of a batch.
        wish: processes that read images, as of `num_workers`.
        device: that the model is on; None for the CPU.

    Raises:
        CAPError: the batch size is not positive.
    """
    if batch_size < 1:
        raise CAPError(f"the batch size {batch_size} must be at least 1")
    device = device or torch.device("cpu")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers(wish, device),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )


def calibration_split(split: datasets.Dataset, num_examples: int, seed: int) -> datasets.Dataset:
    """`num_examples` of a split (all, where it has fewer) in a random order that the seed fixes."""
    return split.shuffle(seed=seed).select(range(min(num_examples, len(split))))
