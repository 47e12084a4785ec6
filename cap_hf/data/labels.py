"""Labels as numbers: the model's own numbers of its classes, or the dataset's where the model has none."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from transformers import PretrainedConfig

from cap_hf.data.arguments import DataArguments
from cap_hf.data.classes import ClassNames, check_integers, check_numbers, number_in, pair
from cap_hf.errors import CAPError
from cap_hf.notices import warn_once
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
        others = [column for column in features if column != image]
        if isinstance(features[image], datasets.Value) and features[image].dtype in STRINGS:
            raise CAPError(
                f"column {image!r} holds text, not images. Of paths make a file metadata.csv with the column file_name "
                "beside the images, and give --dataset_name their folder; else name one of "
                f"{summarize(others)} with {_flag('image')}"
            )
        raise CAPError(f"column {image!r} holds no images: name one of {summarize(others)} with {_flag('image')}")
    return image, find_column(features, args.label_column_name, datasets.ClassLabel, "label", optional=True)


class LabelNumbers:
    """Maps the values of a label column to numbers, example by example: no example is read for it.

    What the labels are called is compared with what the model calls its classes. Capitals, spaces, `-`, `_` and `/` do
    not count, and one of several synonyms, as in `tench, Tinca tinca`, is enough. A dataset may have only some of the
    model's classes.

    - A name that is a whole number is that number: `3`, `03` and `LABEL_3` mean class 3, whether the column holds
      classes or text. Where the model calls its classes by other numbers, they are names like any others.
    - Classes are paired with the model's by name, or all of them by number, or not at all: see `pair`.
    - Text is taken by name: each value must mean one class.
    - Integers are the model's own numbers of its classes.
    - A label that is missing, `None` or -1, is an error where it is met.

    Without a model's classes the labels are the dataset's own numbers, and strings have a number each that is made from
    them alone: the same in every split, whichever names occur in it.

    Args:
        split: with the column.
        column: of the labels.
        config: of a model whose classes the labels are; None for a backbone.

    Raises:
        CAPError: the column holds no labels, or which classes they mean cannot be known, as where only some names are
            the model's, names and numbers are mixed, or numbers begin with 1; from a call: a label is none of the
            classes.
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
                self.classes = feature.num_classes
                self.known = f"the dataset has {feature.num_classes}: {summarize(feature.names)}"
            return
        model = ClassNames(label_names(config))
        self.classes, self.known = len(model.names), str(model)
        if isinstance(feature, datasets.ClassLabel):
            self.ids = dict(enumerate(pair(feature.names, model, column)))
            return
        # Of all examples that there are, not only of those chosen from them: numbers that begin with 1 may show at
        # their end alone. Of a stream there are those that were asked for.
        values = [value for value in split.data.column(column).unique().to_pylist() if value is not None]
        if is_string:
            check_numbers(values, model, column)
            meant = {value: model.meant_by(value) for value in values}
            self.ids = {value: next(iter(numbers)) for value, numbers in meant.items() if len(numbers) == 1}
        else:
            check_integers(values, model, column)
        numbers = {number_in(str(value)) for value in values}
        if not model.has_numbers and 1 in numbers and 0 not in numbers and split.data.num_rows >= 10 * self.classes:
            warn_once(
                logger,
                f"None of {split.data.num_rows} examples has label 0 in {column!r}: its numbers are taken for the "
                "model's, which count from 0. If they count from 1, take 1 from each",
            )

    def __call__(self, values: list, indices: list[int]) -> np.ndarray:
        """Return the labels of some examples as numbers, `(n,)` int64.

        Args:
            values: what the column holds.
            indices: which examples they are, for the error.
        """
        return np.asarray([self._number(*pair) for pair in zip(values, indices, strict=True)], dtype=np.int64)

    def _number(self, value: object, index: int) -> int:
        number: object
        if self.by_digest:
            number = digest_of(value) if isinstance(value, str) else None
        else:
            number = value if self.ids is None else self.ids.get(value)
        if not isinstance(number, int) or number < 0 or (self.classes is not None and number >= self.classes):
            raise CAPError(f"example {index} has label {value!r} in {self.column!r}, {self.known}")
        return number


def _flag(role: str) -> str:
    return f"--{role}_column_name"


def digest_of(name: str) -> int:
    """Return a number of 63 bits that stands for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
