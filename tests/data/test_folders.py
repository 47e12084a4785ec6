"""Folders of images as people have them: links, capitals, splits without classes. Nothing is left out in silence."""

import os
import re
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image

from cap_hf.data.arguments import DataArguments
from cap_hf.data.folders import open_builders
from cap_hf.data.splits import load_splits
from cap_hf.errors import CAPError
from cap_hf.notices import warn_once


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def images(root, *folders, count=3):
    """Write a few images into each folder; return the root."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(root / folder / f"{number}.png")
    return root


def found(root, streaming=None, needed=("train", "eval")):
    """The images of each split, and of each class in it."""
    splits = load_splits(DataArguments(str(root), streaming=streaming), needed=needed)
    return {
        name: Counter(split.features["label"].int2str(split["label"][:])) if "label" in split.features else len(split)
        for name, split in splits.items()
    }


WHOLE = {"train": {"cat": 3, "dog": 3}, "eval": {"cat": 3, "dog": 3}}


def classes_are_links(root):
    """One class of the train split, both of the test split, and of one of these a folder within."""
    disk = images(root / "disk", "a/cat", "a/dog")
    images(root / "d", "train/cat")
    (root / "d" / "test").mkdir()
    (root / "d" / "train" / "dog").symlink_to(disk / "a" / "dog")
    for name in ("cat", "dog"):
        (root / "d" / "test" / name).symlink_to(disk / "a" / name)
    return root / "d"


def splits_are_links(root):
    disk = images(root / "disk", "t [1]/cat", "t [1]/dog")
    (root / "d").mkdir()
    for name in ("train", "Test"):
        (root / "d" / name).symlink_to(disk / "t [1]", target_is_directory=True)
    (disk / "t [1]" / "dog" / "above").symlink_to(disk / "t [1]")  # a circle
    return root / "d"


def all_is_a_link(root):
    (root / "d").symlink_to(images(root / "disk", "train/cat", "train/dog", "val/cat", "val/dog"))
    return root / "d"


def capitals(root):
    return images(root / "d", "Training/cat", "Training/dog", "Testing/cat", "Testing/dog")


LINKS = [classes_are_links, splits_are_links, all_is_a_link, capitals]


@pytest.mark.parametrize("make", LINKS)
@pytest.mark.parametrize("streaming", [None, True])
def test_all_images_are_found(make, streaming, tmp_path):
    """`datasets` follows no link to a folder: a class was missing without a word, or all were."""
    assert found(make(tmp_path), streaming) == WHOLE


def test_words_of_splits_in_names_of_classes_are_no_splits(tmp_path):
    """`datasets` takes train/test_tube for a part of the test split."""
    root = images(tmp_path / "d", "train/cat", "train/test_tube", "test/cat", "test/test_tube")
    assert found(root) == {name: {"cat": 3, "test_tube": 3} for name in ("train", "eval")}
    # Classes: Train is no split among them.
    assert found(images(tmp_path / "e", "Car", "Train"), needed=["train"]) == {"train": {"Car": 3, "Train": 3}}


def test_links_without_splits_are_one_train_split(tmp_path):
    disk = images(tmp_path / "disk", "cat", "dog")
    (tmp_path / "d").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).symlink_to(disk / name)
    assert found(tmp_path / "d", needed=["train"]) == {"train": {"cat": 3, "dog": 3}}


def test_a_card_has_the_last_word(tmp_path):
    root = classes_are_links(tmp_path)
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: c\n  data_files:\n  - {split: train, path: train/**}\n---"
    )
    assert found(root, needed=["train"]) == {"train": 3}


@pytest.mark.parametrize("streaming", [None, True])
def test_classes_in_one_split_alone(streaming, tmp_path):
    root = images(tmp_path / "d", "train/cat", "train/dog", "test")
    assert found(root, streaming) == {"train": {"cat": 3, "dog": 3}, "eval": 3}
    assert found(root, streaming, ["train"]) == {"train": {"cat": 3, "dog": 3}}
    other = images(tmp_path / "e", "train", "test/cat", "test/dog")
    assert found(other, streaming) == {"train": 3, "eval": {"cat": 3, "dog": 3}}


def test_one_class_in_the_first_split_alone(tmp_path):
    """`datasets` gives the images of a first split no labels where the second shows that there are classes."""
    root = images(tmp_path / "d", "train/cat", "test/cat", "test/dog")
    (root / "train" / "dog").mkdir()
    assert found(root) == {"train": {"cat": 3}, "eval": {"cat": 3, "dog": 3}}


def test_a_stray_image_costs_the_labels_of_its_split_and_is_named(tmp_path, caplog):
    warn_once.cache_clear()
    root = images(tmp_path / "d", "train/cat", "train/dog", "test/cat", "test/dog")
    Image.new("L", (8, 8)).save(root / "train" / "stray.png")
    assert found(root) == {"train": 7, "eval": {"cat": 3, "dog": 3}}
    assert "The folders of split train are not taken for classes" in caplog.text
    assert "train/stray.png and " in caplog.text


def test_what_cannot_be_followed_is_named(tmp_path):
    root = images(tmp_path / "d", "train/cat")
    (root / "train" / "dog").symlink_to(tmp_path / "disk" / "dog")
    with pytest.raises(CAPError, match="d/train/dog is a link to .*/disk/dog, where nothing is: remove or mend it"):
        found(root)
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "parquet" / "part-0.parquet")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "data").symlink_to(tmp_path / "parquet")
    with pytest.raises(CAPError, match="e/data is a link to a folder, which is followed to images .* where names tell"):
        found(tmp_path / "e")
    with pytest.raises(CAPError, match="--dataset_name .*parquet is a file: name the folder that it lies in"):
        found(tmp_path / "parquet" / "part-0.parquet")


def test_parquet_files_behind_links(tmp_path):
    for name in ("train", "test"):
        datasets.Dataset.from_dict({"label": [0, 1]}).to_parquet(tmp_path / "disk" / name / "part-0.parquet")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data").symlink_to(tmp_path / "disk")
    splits = load_splits(DataArguments(str(tmp_path / "d")))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "eval": 2}


def linked(root, spec):
    """Make a tree: `a/` has images, `a -> b` is a link to b, `a.txt` is no image."""
    for each in spec:
        name, _, target = each.partition(" -> ")
        place = root / "d" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if target:
            place.symlink_to(target.replace("DISK", str(root / "disk")), target_is_directory=True)
        elif name.endswith("/"):
            images(root / "d", name, count=1)
        elif name.endswith(".png"):
            Image.new("L", (8, 8)).save(place)
        else:
            place.write_text("{}")
    return root / "d"


BOTH = {"train": {"a": 1, "b": 1}, "eval": {"a": 1, "b": 1}}
SPLITS = ["train/a/", "train/b/", "test/a/", "test/b/"]


@pytest.mark.parametrize(
    ("spec", "expected", "said"),
    [
        (["data/train/a/", "data/train/b -> DISK/a", "data/test/a/", "data/test/b -> DISK/b"], BOTH, ""),
        (["train_images/a/", "train_images/b -> DISK/a", "test_images/a/", "test_images/b -> DISK/b"], BOTH, ""),
        (["data -> DISK/whole"], BOTH, ""),
        (
            [*(f"data/{each}" for each in SPLITS), "notes -> DISK/a"],
            BOTH,
            "1 of the 5 files in .*, such as notes/0.png",
        ),
        (["Train/a/", "Train/b/", "Test/a/", "Test/b/", "annotations/x.xml"], BOTH, ""),
        (["train/a/", "train/b/", "Test/a/", "Test/b/", "annotations/x.xml"], BOTH, ""),
        (["data/Train/a/", "data/Train/b/", "data/Test/a/", "data/Test/b/"], BOTH, ""),
        ([*SPLITS, "test/notes.json", "test/more.json", "test/yet.json"], BOTH, ""),
        ([*SPLITS, "all -> train"], BOTH, "Links in .* lead to what is in it anyway: all"),
        (["a/", "b/", "docs -> DISK/docs"], {"train": BOTH["train"]}, "Links in .* no images lie behind them: docs"),
        (["a/", "b/", "a/x -> ..", "b/y -> ../a"], {"train": BOTH["train"]}, "what is in it anyway: a/x, b/y"),
        (["a/", "b -> DISK/a", "c -> a"], {"train": BOTH["train"]}, "what is in it anyway: c"),
    ],
)
def test_splits_and_labels_where_some_folders_are_links(spec, expected, said, tmp_path, caplog):
    """Test images were trained on without a word, labels were lost, or the folder was refused."""
    warn_once.cache_clear()
    images(tmp_path / "disk", "a", "b", *(f"whole/{each}" for each in SPLITS), count=1)
    (tmp_path / "disk" / "docs").mkdir()
    assert found(linked(tmp_path, spec), needed=list(expected)) == expected
    assert len(caplog.messages) == bool(said)
    assert re.search(said, caplog.text)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (["a/", "b/", "a/test_1.png", "c -> DISK/a"], "has no split 'train'; it has test"),
        (
            ["pool/a/", "pool/b/", "test -> pool"],
            "d/test is called as a split, and which images are in that split",
        ),
        (["a/", "b -> DISK/a", "test.csv"], "d/test.csv is called as a split"),
        (["train_test/a/", "train_test/b/", "train_test/c -> DISK/a"], "d/train_test/a is called as a split"),
    ],
)
def test_images_that_may_be_of_the_test_split_are_not_trained_on(spec, said, tmp_path):
    images(tmp_path / "disk", "a")
    with pytest.raises(CAPError, match=said):
        found(linked(tmp_path, spec), needed=["train"])


def random_tree(rng, root):
    """Make a few folders, each with an image or a text, under random names with at most one word of a split."""
    words = ["", "train", "test", "val", "train_images", "my-test 2"][: rng.integers(1, 7)]
    before, after = rng.choice(["", "data", "latest"], 2)
    for _ in range(rng.integers(2, 8)):
        folder = root / before / rng.choice(words) / after / rng.choice(["a", "b", "c"])
        folder.mkdir(parents=True, exist_ok=True)
        name = ["1.png", "test_1.png", "1.txt"][rng.choice(3, p=[0.8, 0.1, 0.1])]
        Image.new("L", (4, 4)).save(folder / name, "PNG")


def with_links(rng, root, disk):
    """Put some folders elsewhere and links in their places, links within what is linked too."""
    disk.mkdir()
    folders = [place for place in root.rglob("*") if place.is_dir()]
    for number, folder in enumerate(sorted(folders, key=lambda place: -len(place.parts))):
        if rng.random() < 0.4:
            folder.rename(disk / str(number))
            folder.symlink_to(disk / str(number))


def contents(builders, root):
    """The label of each image by split, or the images alone."""
    found = {}
    for builder in builders:
        builder.download_and_prepare()
        for split, images in builder.as_dataset().items():
            rows = images.cast_column("image", datasets.Image(decode=False))
            labels = images.features["label"].int2str(images["label"][:]) if "label" in images.features else None
            places = [os.path.relpath(image["path"], root) for image in rows["image"]]
            found[split] = sorted(places) if labels is None else sorted(zip(places, labels, strict=True))
    return found


def files_of(builders, root):
    return {
        str(split): sorted(os.path.relpath(file, root) for file in files)
        for builder in builders
        for split, files in builder.config.data_files.items()
    }


def test_links_change_nothing(tmp_path):
    """`datasets` reads a random tree, and this package the same one with some of its folders as links."""
    rng, compared, labelled = np.random.default_rng(0), 0, 0
    for number in range(30):
        real, linked = tmp_path / f"{number}" / "real", tmp_path / f"{number}" / "linked"
        random_tree(rng, real)
        shutil.copytree(real, linked)
        with_links(rng, linked, tmp_path / f"{number}" / "disk")
        try:
            theirs = datasets.load_dataset_builder(str(real))
        except ValueError:
            continue  # a split of texts alone
        if theirs.name != "imagefolder":
            continue
        own = open_builders(DataArguments(str(linked)), None)
        assert files_of(own, linked) == files_of([theirs], real), number
        compared += 1
        # In a few cases what is read too, where classes are in all splits and `datasets` takes them rightly.
        if own[0].config.drop_labels is None and labelled < 5:
            labelled += 1
            assert contents(own, linked) == contents([theirs], real), number
    assert compared > 18
    assert labelled == 5


def test_what_datasets_reads_rightly_is_left_to_it(tmp_path):
    """So that what is in its cache already stays of use."""
    root = images(tmp_path / "d", "train/cat", "train/dog", "test/cat", "test/dog")
    (builder,) = open_builders(DataArguments(str(root)), None)
    assert builder.cache_dir == datasets.load_dataset_builder(str(root)).cache_dir


def test_a_folder_that_is_gone_is_not_taken_from_the_cache_of_another(tmp_path, monkeypatch, caplog):
    """`datasets` finds what any folder of that name once held, and takes it for a dataset of the Hub."""
    warn_once.cache_clear()
    monkeypatch.chdir(tmp_path)
    assert found(images(tmp_path / "e" / "d", "train/cat", "train/dog"), needed=["train"]) == {"train": WHOLE["train"]}
    with pytest.raises(CAPError, match="--dataset_name d cannot be loaded: it is no folder, nor on the Hub"):
        found("d", needed=["train"])
    assert not caplog.records
    (cached,) = (path for path in (tmp_path / "cache" / "d" / "default" / "0.0.0").iterdir() if path.is_dir())
    os.renames(cached, tmp_path / "cache" / "someone___d" / "default" / "0.0.0" / ("0123456789" * 4))
    assert found("someone/d", needed=["train"]) == {"train": WHOLE["train"]}
    assert caplog.messages == ["The Hub cannot be asked for someone/d: what is cached of it is used."]
