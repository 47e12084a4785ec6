"""Datasets of every kind become the model's inputs; what does not fit is named in one line."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig

from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset, calibration_split, collate, make_dataloader
from cap_hf.data.splits import load_splits
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


def test_without_labels_there_are_only_pixels(processor):
    split = load_splits(DataArguments())["eval"].remove_columns("label")
    for has_head in (True, False):
        dataset = ImageDataset(split, processor, config_of(["a", "b"]), DataArguments(), has_head)
        assert not dataset.labelled
        batch = next(iter(make_dataloader(dataset, 5)))
        assert list(batch) == ["pixel_values"]
        assert len(batch["pixel_values"]) == 5
        with pytest.raises(CAPError, match="no column of labels among image: name one with --label_column_name"):
            dataset.need_labels()
        with pytest.raises(CAPError, match="into a folder of their own, or leave the evaluation out$"):
            dataset.need_labels("leave the evaluation out")
    with pytest.raises(CAPError, match="there is no column 'digit': name one of image with --label_column_name"):
        ImageDataset(split, processor, config_of(["a"]), DataArguments(label_column_name="digit"))


def test_a_backbones_config_says_nothing_about_labels(processor):
    split = load_splits(DataArguments())["eval"]
    config = config_of(["a", "b"])
    with pytest.raises(CAPError, match="'label' has 10 classes"):
        ImageDataset(split, processor, config, DataArguments())
    dataset = ImageDataset(split, processor, config, DataArguments(), has_head=False)
    assert dataset.labelled
    assert dataset.need_labels() is dataset
    assert next(iter(make_dataloader(dataset, 5)))["labels"].tolist() == split[:5]["label"]


def test_a_wrong_label_is_named_with_its_example(processor):
    split = load_splits(DataArguments())["eval"].select(range(20)).cast_column("label", datasets.Value("int64"))
    dataset = ImageDataset(split, processor, config_of(["0", "1", "2"]), DataArguments())
    first = next(index for index, label in enumerate(split["label"][:]) if label > 2)
    with pytest.raises(CAPError, match=f"example {first} has label {split['label'][first]} in 'label'"):
        list(make_dataloader(dataset, 4))


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


def test_a_picture_of_16_bits_is_as_bright_as_one_of_8(tmp_path, processor):
    """Its greys were cut off at 255: nearly all of it was white."""
    plain = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for name, values in (("plain", plain), ("deep", plain * np.uint16(257)), ("unknown", plain * np.int32(9999))):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "0.tiff")
    made = {}
    for name in ("plain", "deep", "unknown"):
        split = load_splits(DataArguments(dataset_name=str(tmp_path / name)), needed=["train"])["train"]
        made[name] = ImageDataset(split, processor, config_of([]), DataArguments())
    assert torch.equal(made["plain"][0]["pixel_values"], made["deep"][0]["pixel_values"])
    with pytest.raises(CAPError, match=r"image 0 \(.*unknown/0.tiff\) cannot be read: its values are 0 to 2519748 and"):
        made["unknown"][0]
    said = ImageDataset(made["unknown"].rows, processor, config_of([]), DataArguments(white_level=255 * 9999.0))
    assert torch.equal(said[0]["pixel_values"], made["plain"][0]["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"do_resize": False},
            r"image 0 \(column 'image'\) 8x8 pixels and image 1 \(column 'image'\) 8x9, which do not",
        ),
        ({"size": None}, r"cannot take image 0 \(column 'image'\) of 8x8 pixels: `size` and .*must be specified"),
        ({"image_mean": [0.5, 0.5]}, r"image 0 \(column 'image'\) of 8x8 pixels: mean must have 1 elements"),
        ({"do_center_crop": True, "crop_size": None}, "`crop_size` must be specified .*: look at preprocessor_config"),
        ({"image_std": [0.0]}, "makes pixels that are no numbers: look at image_std"),
        (
            {"do_convert_rgb": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            "3 channels .8x8.* takes 1: look at",
        ),
    ],
)
def test_an_image_processor_that_does_not_fit_is_named(settings, said, processor):
    for name, value in settings.items():
        setattr(processor, name, value)
    images = [Image.new("L", (8, 8), 9), Image.new("L", (9, 8), 9)]
    split = datasets.Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image()))
    dataset = ImageDataset(split, processor, config_of([]), DataArguments())
    with pytest.raises(CAPError, match=said) as caught:
        next(iter(make_dataloader(dataset, 2)))
    assert "\n" not in str(caught.value)


def test_an_image_processor_without_pixels_is_named():
    split = load_splits(DataArguments())["eval"].select([0])
    dataset = ImageDataset(split, lambda **_: {"patches": [1]}, config_of([]), DataArguments(), has_head=False)
    with pytest.raises(CAPError, match="function makes no pixel_values of each image, but patches"):
        dataset[0]


def test_calibration_split_is_seeded():
    train = load_splits(DataArguments())["train"]
    picks = [calibration_split(train, 50, seed)["label"][:] for seed in (1, 1, 2)]
    assert picks[0] == picks[1] != picks[2]
    assert len(calibration_split(train, 10**6, 0)) == len(train)


def test_collate_and_batch_size():
    examples = [{"pixel_values": torch.ones(1, 2, 2), "labels": torch.tensor(3)}] * 2
    assert collate(examples)["pixel_values"].shape == (2, 1, 2, 2)
    other = {"pixel_values": torch.ones(1, 2, 3), "labels": torch.tensor(3)}
    with pytest.raises(CAPError, match=r"pixel_values of one batch are \(1, 2, 2\) and \(1, 2, 3\): set do_resize"):
        collate([*examples, other])
    with pytest.raises(CAPError, match="batch size 0"):
        make_dataloader(examples, 0)
