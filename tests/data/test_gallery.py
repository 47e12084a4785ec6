"""Images whose prediction changed: counted, chosen evenly, small, and those of the dataset."""

import base64
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil

from cap_hf.data.arguments import DataArguments
from cap_hf.data.gallery import SIDE, changed_predictions, data_uri, labels_of
from cap_hf.data.images import ImageDataset

NAMES = {0: "cat", 1: "dog", 2: "fox"}


def dataset(count: int = 10, side: int = 8) -> ImageDataset:
    """Grey images, each of its own brightness, whose labels go round."""
    images = [Image.new("L", (side, side), 10 * place) for place in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES.values()))})
    split = datasets.Dataset.from_dict({"image": images, "label": [place % 3 for place in range(count)]}, features)
    config = ViTConfig(num_channels=1, id2label=NAMES, label2id={name: number for number, name in NAMES.items()})
    return ImageDataset(split, ViTImageProcessorPil(do_convert_rgb=False), config, DataArguments())


def decoded(uri: str) -> Image.Image:
    kind, _, text = uri.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_what_changed_is_counted_and_shown():
    data = dataset()
    labels = torch.tensor([place % 3 for place in range(10)])
    dense, sparse = labels.clone(), labels.clone()
    dense[4] = 2  # wrong before, right now
    sparse[[1, 7]] = 0  # right before, wrong now
    dense[8], sparse[8] = 0, 1  # wrong before and now
    found = changed_predictions(data, NAMES, dense, sparse)
    counts = {key: found[key] for key in ("images", "changed", "lost", "won")}
    assert counts == {"images": 10, "changed": 4, "lost": 2, "won": 1}
    assert [each["example"] for each in found["shown"]] == [1, 4, 7, 8]
    first = found["shown"][0]
    assert (first["label"], first["dense"], first["sparse"]) == ("dog", "dog", "cat")
    assert [np.asarray(decoded(each["image"])).mean() for each in found["shown"]] == [10, 40, 70, 80]


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (0, [])])
def test_not_more_than_so_many_are_shown_spread_over_all(count, expected):
    found = changed_predictions(dataset(), {}, torch.zeros(10), torch.ones(10), count)
    assert [each["example"] for each in found["shown"]] == expected
    assert found["changed"] == 10


def test_where_nothing_changed_nothing_is_shown():
    found = changed_predictions(dataset(), NAMES, torch.ones(5), torch.ones(5))
    assert (found["images"], found["changed"], found["shown"]) == (5, 0, [])


def test_labels_are_read_without_the_images(monkeypatch):
    data = dataset()
    monkeypatch.setattr(ImageDataset, "_decode", None)
    assert labels_of(data, 4).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_images_are_small_pngs(mode):
    image = decoded(data_uri(Image.new(mode, (4 * SIDE, 2 * SIDE))))
    assert image.size == (SIDE, SIDE // 2)
    assert image.mode == ("L" if mode == "L" else "RGB")
