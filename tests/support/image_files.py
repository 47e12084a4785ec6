"""Datasets of many small images as files: parquet as `datasets` writes it, parquet of small row groups, tars."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def jpegs(count: int, side: int) -> list[bytes]:
    """Encoded images of noise, which JPEG makes as large as it can."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def shard_examples(shards: int, count: int, classes: int, side: int = 16) -> Iterator[list[tuple[bytes, int]]]:
    """The images and labels of each shard, all in the order of the classes; no two images have the same bytes.

    Each is one of a few images with its number behind it, which decoders do not read.
    """
    images, number = jpegs(50, side), 0
    for _ in range(shards):
        examples = []
        for _ in range(count // shards):
            examples.append((images[number % 50] + number.to_bytes(4, "big"), number * classes // count))
            number += 1
        yield examples


def write_parquet(
    folder: Path, shards: int, count: int, classes: int, side: int = 16, old: bool = False, split: str = "train"
) -> Path:
    """Write a folder of parquet files as `push_to_hub` does, or (`old`) as it did: 100 images per row group and page.

    Beside image and label there is a column that nobody needs, as large as half an image.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=[str(number) for number in range(classes)]),
        embedding=datasets.Value("binary"),
    )
    rng = np.random.default_rng(1)
    settings = {"batch_size": 100, "use_content_defined_chunking": False} if old else {}
    for index, examples in enumerate(shard_examples(shards, count, classes, side)):
        table = {
            "image": [{"bytes": image, "path": f"{index}-{place}.jpg"} for place, (image, _) in enumerate(examples)],
            "label": [label for _, label in examples],
            "embedding": [rng.bytes(len(image) // 2) for image, _ in examples],
        }
        split_data = datasets.Dataset.from_dict(table, features=features)
        split_data.to_parquet(folder / "data" / f"{split}-{index:05d}-of-{shards:05d}.parquet", **settings)
    return folder


def write_tars(folder: Path, shards: int, count: int, classes: int, side: int = 16) -> Path:
    """Write a folder of tars in the WebDataset format: `0000123.jpg` and `0000123.cls` for each example."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for index, examples in enumerate(shard_examples(shards, count, classes, side)):
        with tarfile.open(folder / f"train-{index:05d}.tar", "w") as tar:
            for image, label in examples:
                for ending, content in (("jpg", image), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return folder
