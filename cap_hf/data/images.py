"""Image datasets for calibration, training and evaluation, all through `datasets`; the embedded digits."""

import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor, PretrainedConfig

from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError, reason
from cap_hf.extras import need
from cap_hf.outputs import label_names
from cap_hf.targets import summarize

logger = logging.getLogger(__name__)

EVAL_SPLITS = ("validation", "test")


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 real 8x8 digits: 3 in 4 to train, the others, as many of each digit, to test."""
    need("sklearn", "demo")
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(d) for d in range(10)]))
    parts = train_test_split(pixels, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    splits = {"train": (parts[0], parts[2]), "test": (parts[1], parts[3])}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"image": [Image.fromarray(image) for image in images], "label": labels}, features=features
            )
            for name, (images, labels) in splits.items()
        }
    )


def load_splits(
    args: DataArguments, seed: int = 42, token: str | None = None, needed: Sequence[str] = ("train", "eval")
) -> datasets.DatasetDict:
    """Load the dataset and name its splits `train` and `eval`.

    Args:
        args: which data.
        seed: of a held-out split.
        token: for a private Hub dataset.
        needed: which of the two the caller uses; the other need not exist.

    Raises:
        CAPError: the dataset cannot be loaded, or a split is missing.
    """
    if args.dataset_name == "digits" and not Path("digits").is_dir():
        loaded = load_digits()
    else:
        try:
            loaded = datasets.load_dataset(args.dataset_name, args.dataset_config_name, token=token)
        except Exception as error:  # whatever a builder, a file or the network raises
            raise CAPError(f"--dataset_name {args.dataset_name} cannot be loaded: {reason(error)}") from error
    names = summarize(list(loaded))
    found = {}
    eval_name = args.eval_split_name or next(
        (name for name in EVAL_SPLITS if name in loaded and name != args.train_split_name), None
    )
    hold_out = "eval" in needed and eval_name is None
    if "train" in needed or hold_out:
        if args.train_split_name not in loaded:
            raise CAPError(f"{args.dataset_name} has no split {args.train_split_name!r}; it has {names}")
        found["train"] = loaded[args.train_split_name]
    if hold_out:
        if args.train_val_split is None:
            raise CAPError(
                f"{args.dataset_name} has no validation or test split, only {names}: name one with "
                "--eval_split_name or hold a share out with --train_val_split 0.15"
            )
        if not 0 < args.train_val_split < 1:
            raise CAPError(f"train_val_split={args.train_val_split} is not between 0 and 1")
        halves = found["train"].train_test_split(args.train_val_split, seed=seed)
        found = {"train": halves["train"], "eval": halves["test"]}
    elif "eval" in needed:
        if eval_name not in loaded:
            raise CAPError(f"{args.dataset_name} has no split {eval_name!r}; it has {names}")
        found["eval"] = loaded[eval_name]
    splits = {}
    for name, limit in (("train", args.max_train_samples), ("eval", args.max_eval_samples)):
        if name not in needed:
            continue
        split = found[name]
        if limit is not None and limit < 1:
            raise CAPError(f"max_{name}_samples={limit} must be at least 1")
        if not len(split):
            raise CAPError(f"the {name} split of {args.dataset_name} is empty")
        splits[name] = split if limit is None or limit >= len(split) else split.shuffle(seed=seed).select(range(limit))
    return datasets.DatasetDict(splits)


def find_column(split: datasets.Dataset, name: str, kind: type, role: str) -> str:
    """Return the column `name`, or the only one of the feature type `kind` where `name` is a default that is not there.

    Raises:
        CAPError: there is no such column, or several.
    """
    if name in split.features:
        return name
    fitting = [column for column, feature in split.features.items() if isinstance(feature, kind)]
    if name == role and len(fitting) == 1:
        return fitting[0]
    raise CAPError(
        f"there is no column {name!r}: name one of {summarize(list(split.features))} with --{role}_column_name"
    )


def label_ids(split: datasets.Dataset, column: str, config: PretrainedConfig) -> np.ndarray:
    """Return the labels of all examples as the model numbers them, `(n,)` int64.

    Class names that are the model's in another order are matched by name; other labels are taken as numbers.

    Raises:
        CAPError: the labels are not the model's.
    """
    feature, values = split.features[column], split.with_format("arrow")[:][column]
    known_names = label_names(config)
    classes = len(known_names)
    # Checkpoints in the wild spell the ids of label2id as strings.
    ids = {name: index for index, name in known_names.items()}
    own = f"the model has {classes}: {summarize(list(known_names.values()))}"
    if isinstance(feature, datasets.ClassLabel):
        if feature.num_classes != classes:
            raise CAPError(f"{column!r} has {feature.num_classes} classes ({summarize(feature.names)}), {own}")
        labels = values.to_numpy().astype(np.int64)
        if set(feature.names) == set(ids):
            known = labels >= 0
            order = np.asarray([ids[name] for name in feature.names])
            labels = np.where(known, order[labels * known], labels)
        elif set(feature.names) & set(ids):
            logger.warning("Only some classes of %r have the model's names: labels are taken as numbers.", column)
    elif isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        names = values.to_pylist()
        unknown = sorted({str(name) for name in names} - set(ids))
        if unknown:
            raise CAPError(f"{column!r} has labels the model does not know ({summarize(unknown)}), {own}")
        labels = np.asarray([ids[name] for name in names], dtype=np.int64)
    elif isinstance(feature, datasets.Value) and "int" in feature.dtype:
        labels = values.to_numpy().astype(np.int64)
    else:
        raise CAPError(f"{column!r} holds {feature}, not labels: name one with --label_column_name")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        where = int(wrong.argmax())
        raise CAPError(f"example {where} has label {labels[where]} in {column!r}, {own}")
    return labels


class ImageDataset(Dataset):
    """A split of `datasets` as the model's inputs: `pixel_values` from its own image processor, and `labels`.

    Args:
        split: with a column of images and one of labels.
        image_processor: the model's.
        config: the model's, for its labels and number of channels.
        args: the names of the columns.

    Raises:
        CAPError: a column is missing or the labels are not the model's; from `__getitems__`: an image is unreadable.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        image_processor: BaseImageProcessor,
        config: PretrainedConfig,
        args: DataArguments,
    ) -> None:
        self.image_column = find_column(split, args.image_column_name, datasets.Image, "image")
        label_column = find_column(split, args.label_column_name, datasets.ClassLabel, "label")
        if not isinstance(split.features[self.image_column], datasets.Image):
            raise CAPError(
                f"column {self.image_column!r} holds no images: name one of {summarize(list(split.features))} "
                "with --image_column_name"
            )
        self.labels = label_ids(split, label_column, config)
        # Decoded here, one by one, so that a broken file can be named.
        self.images = split.select_columns(self.image_column).cast_column(
            self.image_column, datasets.Image(decode=False)
        )
        self.decoder = datasets.Image()
        self.image_processor = image_processor
        self.mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Return the decoded image of an example."""
        return self._decode(index, self.images[index][self.image_column])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        raw = self.images[list(indices)][self.image_column]
        images = [self._decode(index, value) for index, value in zip(indices, raw, strict=True)]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        labels = torch.from_numpy(self.labels[list(indices)])
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]

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
