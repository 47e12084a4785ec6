"""Labels as numbers: the model's own numbers of its classes, or the dataset's where the model has none."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from transformers import PretrainedConfig

from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError
from cap_hf.outputs import label_names
from cap_hf.targets import summarize

logger = logging.getLogger(__name__)

STRINGS = ("string", "large_string")


def find_column(features: datasets.Features, name: str, kind: type, role: str, optional: bool = False) -> str | None:
    """Return the column `name`, or the only one of the feature type `kind` where `name` is a default that is not there.

    Args:
        features: of the dataset.
        name: as the user, or the default, has it.
        kind: `datasets.Image` or `datasets.ClassLabel`.
        role: 'image' or 'label', which is the default name too.
        optional: whether a dataset without such a column is fine, where the name is the default.

    Returns:
        The column's name; None where it is optional and not there.

    Raises:
        CAPError: there is no such column, or several.
    """
    if name in features:
        return name
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if name == role and len(fitting) == 1:
        return fitting[0]
    if optional and name == role and not fitting:
        return None
    choices = fitting if fitting and name == role else list(features)
    raise CAPError(f"there is no column {name!r}: name one of {summarize(choices)} with {_flag(role)}")


def find_columns(features: datasets.Features, args: DataArguments) -> tuple[str, str | None]:
    """Return the column of images and the one of labels, None where there are no labels and none were named.

    Raises:
        CAPError: a column that is named is missing, several columns fit, or the one of images holds none.
    """
    image = find_column(features, args.image_column_name, datasets.Image, "image")
    assert image is not None
    if not isinstance(features[image], datasets.Image):
        raise CAPError(
            f"column {image!r} holds no images: name one of {summarize(list(features))} with {_flag('image')}"
        )
    return image, find_column(features, args.label_column_name, datasets.ClassLabel, "label", optional=True)


class LabelNumbers:
    """Maps the values of a label column to numbers, example by example: the column is never read as a whole.

    Class names that are the model's in another order are matched by name; other labels are taken as numbers. Without a
    model's classes the labels are the dataset's own numbers, and strings have a number each that is made from them
    alone: the same in every split, whichever names occur in it.

    Args:
        split: with the column.
        column: of the labels.
        config: of a model whose classes the labels are; None for a backbone.

    Raises:
        CAPError: the column holds no labels, or not as many classes as the model has; from a call: a label is none of
            the classes.
    """

    def __init__(self, split: datasets.Dataset, column: str, config: PretrainedConfig | None) -> None:
        self.column = column
        # What a stored value means; None where it is the number itself.
        self.ids: Mapping[Any, int] | None = None
        self.by_digest = False
        self.classes: int | None = None
        self.known = "the dataset numbers its labels from 0"
        feature = split.features[column]
        is_string = isinstance(feature, datasets.Value) and feature.dtype in STRINGS
        is_integer = isinstance(feature, datasets.Value) and "int" in feature.dtype
        if not (is_string or is_integer or isinstance(feature, datasets.ClassLabel)):
            raise CAPError(f"{column!r} holds {feature}, not labels: name one with {_flag('label')}")
        if config is None:
            self.by_digest = is_string
            if isinstance(feature, datasets.ClassLabel):
                self._set_classes(feature.names, "the dataset")
            return
        names = label_names(config)
        self._set_classes(list(names.values()), "the model")
        # Checkpoints in the wild spell the ids of label2id as strings.
        ids = {name: number for number, name in names.items()}
        if is_string:
            self.ids = dict(ids)
        elif isinstance(feature, datasets.ClassLabel):
            if feature.num_classes != self.classes:
                raise CAPError(
                    f"{column!r} has {feature.num_classes} classes ({summarize(feature.names)}), {self.known}"
                )
            if set(feature.names) == set(ids):
                self.ids = {number: ids[name] for number, name in enumerate(feature.names)}
            elif set(feature.names) & set(ids):
                logger.warning("Only some classes of %r have the model's names: labels are taken as numbers.", column)

    def __call__(self, values: list, indices: list[int]) -> np.ndarray:
        """Return the labels of some examples as numbers, `(n,)` int64.

        Args:
            values: what the column holds.
            indices: which examples they are, for the error.
        """
        return np.asarray([self._number(*pair) for pair in zip(values, indices, strict=True)], dtype=np.int64)

    def _set_classes(self, names: list[str], owner: str) -> None:
        self.classes = len(names)
        self.known = f"{owner} has {len(names)}: {summarize(names)}"

    def _number(self, value: object, index: int) -> int:
        number: object
        if self.by_digest:
            number = digest_of(value) if isinstance(value, str) else None
        else:
            number = value if self.ids is None else self.ids.get(value)
        if not isinstance(number, int) or number < 0 or (self.classes is not None and number >= self.classes):
            raise CAPError(f"example {index} has label {value} in {self.column!r}, {self.known}")
        return number


def _flag(role: str) -> str:
    return f"--{role}_column_name"


def digest_of(name: str) -> int:
    """Return a number of 63 bits that stands for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
