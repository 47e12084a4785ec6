"""Datasets of every kind become the model's inputs; what does not fit is named in one line."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig

from cap_hf.data.images import (
    DataArguments,
    ImageDataset,
    calibration_split,
    collate,
    label_ids,
    load_splits,
    make_dataloader,
)
from cap_hf.errors import CAPError


@pytest.fixture
def processor(tiny_checkpoint):
    return AutoImageProcessor.from_pretrained(tiny_checkpoint)


def config_of(names) -> ViTConfig:
    return ViTConfig(
        num_channels=1, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )


def write_imagefolder(root, names=("cat", "dog"), splits=("train", "test"), count=3):
    for split in splits:
        for value, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.full((10, 12, 3), 40 * value + index, np.uint8)).save(folder / f"{index}.png")


def test_digits(processor):
    splits = load_splits(DataArguments())
    assert len(splits["train"]) + len(splits["eval"]) == 1797
    dataset = ImageDataset(splits["eval"], processor, config_of([str(d) for d in range(10)]), DataArguments())
    batch = next(iter(make_dataloader(dataset, 5)))
    assert batch["pixel_values"].shape == (5, 1, 8, 8)
    assert batch["labels"].tolist() == splits["eval"][:5]["label"]
    pixels = np.asarray(splits["eval"][2]["image"], dtype=np.float32)
    np.testing.assert_allclose(batch["pixel_values"][2, 0].numpy(), pixels / 255 * 2 - 1, atol=1e-6)


def test_imagefolder_and_parquet(tmp_path, processor):
    write_imagefolder(tmp_path / "images")
    config = config_of(["dog", "cat"])
    from_images = load_splits(DataArguments(dataset_name=str(tmp_path / "images")))
    for name in ("train", "test"):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        split = from_images["train" if name == "train" else "eval"]
        split.to_parquet(str(tmp_path / "parquet" / f"{name}-00000-of-00001.parquet"))
    from_parquet = load_splits(DataArguments(dataset_name=str(tmp_path / "parquet")))
    batches = []
    for splits in (from_images, from_parquet):
        dataset = ImageDataset(splits["eval"], processor, config, DataArguments())
        batches.append(next(iter(make_dataloader(dataset, 6))))
        # The model numbers the same classes the other way round: matched by name.
        assert batches[-1]["labels"].tolist() == [1, 1, 1, 0, 0, 0]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


def test_a_missing_split_is_named(tmp_path):
    write_imagefolder(tmp_path, splits=("train",))
    with pytest.raises(CAPError, match="no validation or test split, only train: .*--train_val_split"):
        load_splits(DataArguments(dataset_name=str(tmp_path)))
    splits = load_splits(DataArguments(dataset_name=str(tmp_path), train_val_split=0.5))
    assert len(splits["train"]) == len(splits["eval"]) == 3
    with pytest.raises(CAPError, match="train_val_split=2 is not between"):
        load_splits(DataArguments(dataset_name=str(tmp_path), train_val_split=2))
    with pytest.raises(CAPError, match="no split 'val'; it has train, test"):
        load_splits(DataArguments(eval_split_name="val"))
    with pytest.raises(CAPError, match="no split 'training'; it has train, test"):
        load_splits(DataArguments(train_split_name="training"))


def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(CAPError, match="--dataset_name .*nowhere cannot be loaded"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "nowhere")))


def test_limits_are_seeded_samples():
    first = load_splits(DataArguments(max_eval_samples=20, max_train_samples=30), seed=1)
    again = load_splits(DataArguments(max_eval_samples=20, max_train_samples=30), seed=1)
    assert (len(first["train"]), len(first["eval"])) == (30, 20)
    assert first["eval"]["label"][:] == again["eval"]["label"][:]
    with pytest.raises(CAPError, match="max_eval_samples=0"):
        load_splits(DataArguments(max_eval_samples=0))


def test_columns_are_found_or_named(processor):
    split = load_splits(DataArguments())["eval"].rename_columns({"image": "img", "label": "digit"})
    config = config_of([str(d) for d in range(10)])
    assert len(ImageDataset(split, processor, config, DataArguments())) == len(split)
    named = DataArguments(image_column_name="img", label_column_name="digit")
    assert ImageDataset(split, processor, config, named).image_column == "img"
    with pytest.raises(CAPError, match="no column 'picture': name one of img, digit with --image_column_name"):
        ImageDataset(split, processor, config, DataArguments(image_column_name="picture"))
    with pytest.raises(CAPError, match="no column 'class'.*--label_column_name"):
        ImageDataset(split, processor, config, DataArguments(label_column_name="class"))
    with pytest.raises(CAPError, match="'digit' holds no images"):
        ImageDataset(split, processor, config, DataArguments(image_column_name="digit"))


def labelled(feature, values):
    return datasets.Dataset.from_dict({"label": values}, features=datasets.Features(label=feature))


def test_labels_that_are_not_the_models():
    config = config_of(["a", "b", "c"])
    names = datasets.ClassLabel(names=["c", "a", "b"])
    assert label_ids(labelled(names, [0, 1, 2]), "label", config).tolist() == [2, 0, 1]
    others = datasets.ClassLabel(names=["x", "y", "z"])
    assert label_ids(labelled(others, [0, 1, 2]), "label", config).tolist() == [0, 1, 2]
    with pytest.raises(CAPError, match=r"'label' has 2 classes \(a, b\), the model has 3: a, b, c"):
        label_ids(labelled(datasets.ClassLabel(names=["a", "b"]), [0]), "label", config)
    strings = datasets.Value("string")
    assert label_ids(labelled(strings, ["b", "a"]), "label", config).tolist() == [1, 0]
    with pytest.raises(CAPError, match=r"does not know \(q\), the model has 3"):
        label_ids(labelled(strings, ["b", "q"]), "label", config)
    config.label2id = {"a": "0", "b": "1", "c": "2"}  # as run_image_classification.py once wrote them
    assert label_ids(labelled(names, [0, 1, 2]), "label", config).tolist() == [2, 0, 1]
    assert label_ids(labelled(strings, ["b", "a"]), "label", config).tolist() == [1, 0]
    integers = datasets.Value("int32")
    assert label_ids(labelled(integers, [2, 0]), "label", config).tolist() == [2, 0]
    for wrong in (3, -1):
        with pytest.raises(CAPError, match=f"example 1 has label {wrong} in 'label', the model has 3"):
            label_ids(labelled(integers, [0, wrong]), "label", config)
    with pytest.raises(CAPError, match="example 1 has label -1"):
        label_ids(labelled(names, [0, -1]), "label", config)
    with pytest.raises(CAPError, match="not labels"):
        label_ids(labelled(datasets.Value("float32"), [0.5]), "label", config)


def test_an_unreadable_image_is_named(tmp_path, processor):
    write_imagefolder(tmp_path)
    broken = tmp_path / "test" / "dog" / "1.png"
    broken.write_bytes(b"not an image")
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    dataset = ImageDataset(splits["eval"], processor, config_of(["cat", "dog"]), DataArguments())
    assert dataset[0]["labels"] == 0
    with pytest.raises(CAPError, match=r"image 4 \(.*1\.png\) cannot be read"):
        list(make_dataloader(dataset, 6))


def test_a_missing_image_is_named(processor):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    split = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
    with pytest.raises(CAPError, match=r"image 0 \(column 'image'\) cannot be read"):
        ImageDataset(split, processor, config_of(["a"]), DataArguments())[0]


def test_calibration_split_is_seeded():
    train = load_splits(DataArguments())["train"]
    picks = [calibration_split(train, 50, seed)["label"][:] for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]
    assert len(calibration_split(train, 10**6, 0)) == len(train)


def test_collate_and_batch_size():
    examples = [{"pixel_values": torch.ones(1, 2, 2), "labels": torch.tensor(3)}] * 2
    assert collate(examples)["pixel_values"].shape == (2, 1, 2, 2)
    with pytest.raises(CAPError, match="batch size 0"):
        make_dataloader(examples, 0)
