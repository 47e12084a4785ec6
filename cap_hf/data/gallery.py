"""Images that a sparse model takes for something else than the dense one does."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from cap_hf.data.images import ImageDataset

# Pixels of the longer side: enough to recognise what is on most images, at 15 KB at most.
SIDE = 72


def changed_predictions(
    dataset: ImageDataset, names: Mapping[int, str], dense: torch.Tensor, sparse: torch.Tensor, count: int = 24
) -> dict[str, Any]:
    """Return how many predictions differ between two models, and some of the images where they do.

    Args:
        dataset: labelled, of the images.
        names: of the classes by their numbers.
        dense: `(n,)` the classes that one model predicts, of the first n images.
        sparse: `(n,)` those of the other.
        count: images to show at most, evenly spaced among those that differ.

    Returns:
        `images`: n; `changed`; `lost`: of these the dense model alone was right; `won`: the other alone was; `shown`:
        for each image its `example` number, the names of its `label` and of what the two predict, `dense` and
        `sparse`, and the `image` as a data URI of a small PNG.

    Raises:
        CAPError: an image cannot be read.
    """
    labels = labels_of(dataset, len(dense))
    differs = dense != sparse
    places = differs.nonzero()[:, 0].tolist()
    step = max(1.0, len(places) / max(count, 1))
    chosen = [places[int(index * step)] for index in range(min(count, len(places)))]
    return {
        "images": len(dense),
        "changed": len(places),
        "lost": int((differs & (dense == labels)).sum()),
        "won": int((differs & (sparse == labels)).sum()),
        "shown": [
            {
                "example": place,
                "label": name_of(names, int(labels[place])),
                "dense": name_of(names, int(dense[place])),
                "sparse": name_of(names, int(sparse[place])),
                "image": data_uri(dataset.image(place)),
            }
            for place in chosen
        ],
    }


def labels_of(dataset: ImageDataset, count: int) -> torch.Tensor:
    """Return the labels of the first so many examples, `(count,)` int64, without reading their images."""
    dataset.need_labels()
    assert dataset.numbers is not None
    values = dataset.rows.select_columns([dataset.label_column])[:count][dataset.label_column]
    return torch.from_numpy(dataset.numbers(values, list(range(count))))


def name_of(names: Mapping[int, str], number: int) -> str:
    """Return what a class is called; its number where it has no name."""
    return names.get(number, str(number))


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI: a PNG of at most 72 pixels a side."""
    small = image.convert("L" if image.mode == "L" else "RGB")
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
