"""Examples of a split as the model's inputs."""

from collections.abc import Sequence

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor, PretrainedConfig

from cap_hf.data.arguments import DataArguments
from cap_hf.data.labels import LabelNumbers, find_columns
from cap_hf.errors import CAPError, reason
from cap_hf.targets import summarize


class ImageDataset(Dataset):
    """A split of `datasets` as the model's inputs: `pixel_values` from its own image processor, and `labels` if any.

    Args:
        split: with a column of images and, for labels, one of labels.
        image_processor: the model's.
        config: the model's, for its labels and number of channels.
        args: the names of the columns.
        has_head: whether the model's classes are those of its config; without, labels are the dataset's own numbers.

    Attributes:
        labelled: whether batches have `labels`, because there is a column of labels.

    Raises:
        CAPError: a column is missing or its classes are not the model's; from `__getitems__`: an image is unreadable,
            or its label is none of the classes.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        image_processor: BaseImageProcessor,
        config: PretrainedConfig,
        args: DataArguments,
        has_head: bool = True,
    ) -> None:
        self.image_column, self.label_column = find_columns(split.features, args)
        self.numbers = None
        if self.label_column is not None:
            self.numbers = LabelNumbers(split, self.label_column, config if has_head else None)
        self.columns = list(split.features)
        # Images are decoded here, one by one, so that a broken file can be named.
        self.rows = split.select_columns([name for name in (self.image_column, self.label_column) if name]).cast_column(
            self.image_column, datasets.Image(decode=False)
        )
        self.decoder = datasets.Image()
        self.image_processor = image_processor
        self.mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    @property
    def labelled(self) -> bool:
        """Return whether there is a column of labels."""
        return self.numbers is not None

    def need_labels(self) -> "ImageDataset":
        """Return the dataset itself, for a caller that cannot do without labels.

        Raises:
            CAPError: there are none.
        """
        if not self.labelled:
            raise CAPError(
                f"there is no column of labels among {summarize(self.columns)}: name one with --label_column_name, or "
                "put the images of each class into a folder of their own"
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
        images = [self._decode(index, value) for index, value in zip(indices, rows[self.image_column], strict=True)]
        made = self.image_processor(images=images, return_tensors="pt")
        # Masks and sizes, which some models take beside the pixels.
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        examples = {name: value for name, value in tensors.items() if value.dim() and len(value) == len(images)}
        if self.numbers is not None:
            examples["labels"] = torch.from_numpy(self.numbers(rows[self.label_column], indices))
        return [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]

    def _decode(self, index: int, value: dict | None) -> Image.Image:
        try:
            return self.decoder.decode_example(value).convert(self.mode)
        except Exception as error:  # PIL and the file system raise many kinds
            path = (value or {}).get("path") or f"column {self.image_column!r}"
            raise CAPError(f"image {index} ({path}) cannot be read: {reason(error)}") from error


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack examples into a batch."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def make_dataloader(dataset: Dataset, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches in the dataset's order.

    Raises:
        CAPError: the batch size is not positive.
    """
    if batch_size < 1:
        raise CAPError(f"the batch size {batch_size} must be at least 1")
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)


def calibration_split(split: datasets.Dataset, num_examples: int, seed: int) -> datasets.Dataset:
    """`num_examples` of a split (all, where it has fewer) in a random order that the seed fixes."""
    return split.shuffle(seed=seed).select(range(min(num_examples, len(split))))
