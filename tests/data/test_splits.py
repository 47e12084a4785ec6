"""Datasets of every kind are loaded as a whole, or streamed; what is missing is named in one line."""

import errno
import json
import subprocess

import datasets
import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from support.checkpoints import PYTHON, clean_environment
from support.dataset_hub import DatasetHub
from support.hub_server import Fault
from support.image_files import write_parquet, write_tars

from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import calibration_split
from cap_hf.data.splits import is_streamed, load_splits
from cap_hf.errors import CAPError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def images(root, *paths):
    """Write a grey image under each path, as bright as its place; return the folder."""
    for grey, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), grey, np.uint8)).save(root / path)
    return str(root)


def test_digits():
    splits = load_splits(DataArguments())
    assert len(splits["train"]) + len(splits["eval"]) == 1797
    streamed = load_splits(DataArguments(streaming=True), train_examples=5)
    assert len(streamed["train"]) == len(splits["train"])


def test_a_missing_split_is_named(tmp_path):
    root = images(tmp_path / "d", *(f"train/{name}/{n}.png" for name in ("cat", "dog") for n in range(3)))
    for streaming in (None, True):
        args = {"dataset_name": root, "streaming": streaming}
        with pytest.raises(CAPError, match="no validation or test split, only train: .*--train_val_split"):
            load_splits(DataArguments(**args))
        with pytest.raises(CAPError, match="train_val_split=2 is not between"):
            load_splits(DataArguments(**args, train_val_split=2))
        with pytest.raises(CAPError, match="no split 'val'; it has train"):
            load_splits(DataArguments(**args, eval_split_name="val"))
        with pytest.raises(CAPError, match="no split 'training'; it has train"):
            load_splits(DataArguments(**args, train_split_name="training"), needed=["train"])
    splits = load_splits(DataArguments(dataset_name=root, train_val_split=0.5))
    assert len(splits["train"]) == len(splits["eval"]) == 3
    alone = images(tmp_path / "alone", "train/cat.png")
    with pytest.raises(CAPError, match="1 train images are too few to hold 0.3 of them out"):
        load_splits(DataArguments(dataset_name=alone, train_val_split=0.3))


def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path):
    for streaming in (None, True):
        with pytest.raises(CAPError, match="--dataset_name .*nowhere cannot be loaded"):
            load_splits(DataArguments(dataset_name=str(tmp_path / "nowhere"), streaming=streaming))


CONFIGS = """---
configs:
- config_name: small
  data_files: [{split: train, path: a/train*}]
- config_name: large
  data_files: [{split: train, path: a/train*}]
---
"""


@pytest.mark.parametrize("streaming", [None, True])
def test_configurations_are_there_to_choose_from(streaming, tmp_path):
    """The first line of what `datasets` says is "Config name is missing."."""
    root = write_parquet(tmp_path / "d", shards=1, count=20, classes=2)
    (root / "data").rename(root / "a")
    (root / "README.md").write_text(CONFIGS)

    def load(name=None, folder=root):
        args = DataArguments(str(folder), dataset_config_name=name, streaming=streaming)
        return load_splits(args, needed=["train"])["train"]

    assert len(load("large")) == 20
    with pytest.raises(
        CAPError, match="d has several configurations: choose one with --dataset_config_name, small, large"
    ):
        load()
    with pytest.raises(CAPError, match="d has no --dataset_config_name medium; it has small, large"):
        load("medium")
    with pytest.raises(CAPError, match="e has no --dataset_config_name small; it has default"):
        load("small", write_parquet(tmp_path / "e", shards=1, count=20, classes=2))


@pytest.mark.parametrize("streaming", [None, True])
def test_a_cache_that_cannot_be_written_is_named_not_the_dataset(streaming, tmp_path, monkeypatch):
    root = images(tmp_path / "d", "train/cat/a.png", "train/dog/b.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    args = DataArguments(root, streaming=streaming)
    with pytest.raises(
        CAPError, match="the datasets cache, .*/file/datasets, cannot be written: .*Not a dir"
    ) as caught:
        load_splits(args, needed=["train"])
    assert "HF_DATASETS_CACHE" in str(caught.value)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    # As it comes out of Arrow, which `datasets` wraps.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(ArrowWriter, "write", full)
    with pytest.raises(CAPError, match="the disk of the datasets cache, .*/cache, is full: free some space, or name"):
        load_splits(args, needed=["train"])
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_metadata_without_names_of_files_is_one_line(tmp_path):
    root = images(tmp_path / "d", "train/a.png")
    (tmp_path / "d" / "train" / "metadata.csv").write_text("name,label\na.png,cat\n")
    with pytest.raises(CAPError, match="cannot be loaded: `file_name`.*must be present.*metadata files"):
        load_splits(DataArguments(root), needed=["train"])


def test_limits_are_seeded_samples():
    first = load_splits(DataArguments(max_eval_samples=20, max_train_samples=30), seed=1)
    again = load_splits(DataArguments(max_eval_samples=20, max_train_samples=30), seed=1)
    assert (len(first["train"]), len(first["eval"])) == (30, 20)
    assert first["eval"]["label"][:] == again["eval"]["label"][:]
    with pytest.raises(CAPError, match="max_eval_samples=0"):
        load_splits(DataArguments(max_eval_samples=0))


# Paths -> the labels of the train split: None where the folders are no classes.
FOLDERS = {
    "flat": (("a.png", "b.png"), None),
    "a split flat": (("train/a.png", "train/b.png"), None),
    "splits flat": (("train/a.png", "train/b.png", "test/c.png"), None),
    "three splits flat": (("train/a.png", "validation/b.png", "test/c.png"), None),
    "one folder": (("cats/a.png", "cats/b.png"), None),
    "one folder per split": (("train/cat/a.png", "test/dog/b.png"), None),
    "nested unevenly": (("x/a.png", "x/y/b.png", "c.png"), None),
    "classes": (("cat/a.png", "dog/b.png"), [0, 1]),
    "classes in one split": (("train/cat/a.png", "train/dog/b.png", "test/cat/c.png"), [0, 1]),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("streaming", [None, True])
def test_folders_of_images_with_and_without_labels(name, streaming, tmp_path):
    paths, labels = FOLDERS[name]
    args = DataArguments(dataset_name=images(tmp_path / "d", *paths), streaming=streaming)
    train = load_splits(args, needed=["train"])["train"]
    assert ("label" in train.features) == (labels is not None)
    brightness = sorted(np.asarray(each)[0, 0] for each in train["image"][:])
    expected = [place for place, path in enumerate(paths) if not path.startswith(("test", "validation"))]
    assert brightness == expected
    if labels is not None:
        assert sorted(train["label"][:]) == labels


def test_what_is_local_is_streamed_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    local, remote = DataArguments(dataset_name=str(tmp_path)), DataArguments(dataset_name="user/name")
    assert not is_streamed(local, False)
    assert is_streamed(remote, False)
    assert not is_streamed(remote, True)
    assert is_streamed(DataArguments(dataset_name=str(tmp_path), streaming=True), True)
    assert not is_streamed(DataArguments(dataset_name="user/name", streaming=False), False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert not is_streamed(remote, False)


def test_without_streaming_the_examples_are_those_of_datasets(tmp_path):
    """Figures that were measured before there was streaming stay what they are."""
    root = str(write_parquet(tmp_path / "d", shards=2, count=60, classes=3))
    plain = datasets.load_dataset(root, split="train")
    for streaming in (None, False):
        train = load_splits(
            DataArguments(dataset_name=root, streaming=streaming), 7, needed=["train"], train_examples=8
        )["train"]
        assert train["embedding"][:] == plain["embedding"][:]
        assert calibration_split(train, 8, 7)["embedding"][:] == plain.shuffle(seed=7)["embedding"][:8]


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_a_folder_is_streamed_when_asked_for(kind, tmp_path):
    write = write_parquet if kind == "parquet" else write_tars
    root = str(write(tmp_path / "d", shards=4, count=200, classes=10))
    column = "label" if kind == "parquet" else "cls"
    args = DataArguments(dataset_name=root, streaming=True, label_column_name=column)
    found = [load_splits(args, seed, needed=["train"], train_examples=50)["train"] for seed in (1, 1, 2)]
    first, again, other = ([image["bytes"] for image in raw(each)] for each in found)
    assert first == again != other
    assert len(set(first)) == 50
    assert len(set(found[0][column][:])) >= 4  # more than one shard shows, which has 2 or 3 classes
    # Columns that nobody needs are not kept; the encoded bytes are those in the file, label and image belong together.
    assert set(found[0].features) == {column, "image" if kind == "parquet" else "jpg"}
    numbers = [int.from_bytes(image[-4:], "big") for image in first]
    assert [number * 10 // 200 for number in numbers] == found[0][column][:]
    assert found[0][0]["image" if kind == "parquet" else "jpg"].size == (16, 16)


def raw(split):
    column = next(name for name, feature in split.features.items() if isinstance(feature, datasets.Image))
    return split.cast_column(column, datasets.Image(decode=False))[column][:]


def numbers_of(split):
    return [int.from_bytes(each["bytes"][-4:], "big") for each in raw(split)]


def test_all_is_streamed_where_nothing_limits_it(tmp_path):
    root = str(write_parquet(tmp_path / "d", shards=3, count=90, classes=3))
    train = load_splits(DataArguments(dataset_name=root, streaming=True), needed=["train"])["train"]
    assert sorted(numbers_of(train)) == list(range(90))
    few = DataArguments(dataset_name=root, streaming=True, max_train_samples=1000)
    assert len(load_splits(few, needed=["train"])["train"]) == 90


def test_what_is_held_out_of_a_stream_is_never_trained_on(tmp_path):
    """However many examples of either are asked for, by whichever command."""
    root = str(write_parquet(tmp_path / "d", shards=4, count=400, classes=4, old=True))

    def load(needed, **limits):
        args = DataArguments(dataset_name=root, streaming=True, train_val_split=0.25, **limits)
        return load_splits(args, 3, needed=needed)

    both = load(["train", "eval"])
    train, held = set(numbers_of(both["train"])), set(numbers_of(both["eval"]))
    assert train | held == set(range(400))
    assert not train & held
    assert 60 < len(held) < 140
    few = load(["train", "eval"], max_train_samples=50, max_eval_samples=20)
    assert set(numbers_of(few["train"])) < train
    assert len(few["train"]) == 50
    assert set(numbers_of(few["eval"])) < held
    # `cap-hf evaluate` on its own sees the same ones.
    alone = load(["eval"], max_eval_samples=20)
    assert numbers_of(alone["eval"]) == numbers_of(few["eval"])


def test_a_wider_choice_is_drawn_from_a_buffer(tmp_path):
    root = str(write_tars(tmp_path / "d", shards=1, count=400, classes=40))
    classes = []
    for size in (0, 300):
        args = DataArguments(
            dataset_name=root, streaming=True, shuffle_buffer_size=size, max_train_samples=50, label_column_name="cls"
        )
        train = load_splits(args, needed=["train"])["train"]
        assert len(set(numbers_of(train))) == 50
        classes.append(len(set(train["cls"][:])))
    assert classes[0] == 5
    assert classes[1] > 20


def test_a_changed_file_is_streamed_anew(tmp_path):
    root = write_parquet(tmp_path / "d", shards=1, count=20, classes=2)
    args = DataArguments(dataset_name=str(root), streaming=True, max_train_samples=20)
    assert max(numbers_of(load_splits(args, needed=["train"])["train"])) == 19
    for file in (root / "data").iterdir():
        file.unlink()
    write_parquet(root, shards=1, count=30, classes=2)
    args.max_train_samples = 30
    assert max(numbers_of(load_splits(args, needed=["train"])["train"])) == 29


def test_bad_streams_are_one_line_and_nothing_is_kept(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    for name, split in {
        "empty": datasets.Dataset.from_dict({"image": [], "label": []}, features=features),
        "no images": datasets.Dataset.from_dict({"text": ["a"], "label": [0]}),
    }.items():
        (tmp_path / name).mkdir()
        split.to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    broken = write_parquet(tmp_path / "broken", shards=1, count=20, classes=2)
    file = next((broken / "data").iterdir())
    file.write_bytes(b"PAR1" + bytes(200) + file.read_bytes()[204:])
    for name, expected in {
        "empty": "the train split of .*empty is empty",
        "no images": "there is no column 'image': name one of text, label with --image_column_name",
        "broken": "--dataset_name .*broken cannot be streamed: ",
    }.items():
        with pytest.raises(CAPError, match=expected) as caught:
            args = DataArguments(dataset_name=str(tmp_path / name), streaming=True)
            load_splits(args, needed=["train"], train_examples=4)
        assert "\n" not in str(caught.value)
    assert [path.suffix for path in (tmp_path / "cache" / "cap_hf").iterdir() if path.suffix != ".lock"] == []


# Streams what a line of its input asks for, since a process knows one Hub only, and takes seconds to begin.
STREAM = """
import json, sys
from pathlib import Path
import datasets
from cap_hf.data.arguments import DataArguments
from cap_hf.data.splits import load_splits
from cap_hf.errors import CAPError

def stream(name, column, cache):
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    args = DataArguments(dataset_name=name, label_column_name=column, max_train_samples=64)
    try:
        train = load_splits(args, seed=1, needed=["train"])["train"]
    except CAPError as error:
        return str(error)
    image = next(name for name, feature in train.features.items() if isinstance(feature, datasets.Image))
    rows = train.cast_column(image, datasets.Image(decode=False))[image][:]
    return sorted(int.from_bytes(each["bytes"][-4:], "big") for each in rows)

for line in sys.stdin:
    print(json.dumps(stream(*json.loads(line))), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    with DatasetHub() as running:
        running.datasets = {
            "user/parquet": write_parquet(folder / "parquet", shards=8, count=8000, classes=100, side=40),
            "user/old": write_parquet(folder / "old", shards=8, count=8000, classes=100, side=40, old=True),
            "user/tars": write_tars(folder / "tars", shards=4, count=16000, classes=100, side=40),
        }
        yield running


@pytest.fixture(scope="module")
def stream(hub, tmp_path_factory):
    """A function that streams in a process whose Hub is this one, and returns the examples or what was said."""
    environment = clean_environment(tmp_path_factory.mktemp("home"), HF_ENDPOINT=hub.url)
    with subprocess.Popen(
        [PYTHON, "-c", STREAM], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(name, column, cache):
            process.stdin.write(json.dumps([name, column, str(cache)]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


# Of the bytes of the dataset, what 64 examples may cost: pages of up to 1 MB of each of 8 files, a row group of each of
# 32 places. A tar is sent ahead of its reader into the buffers of both ends of the connection, some MB on one machine.
@pytest.mark.parametrize(
    ("name", "column", "most"),
    [("user/parquet", "label", 0.5), ("user/old", "label", 0.35), ("user/tars", "cls", 0.75)],
)
def test_only_a_part_of_a_hub_dataset_is_fetched_and_only_once(hub, stream, name, column, most, tmp_path):
    hub.sent = 0
    first = stream(name, column, tmp_path / "cache")
    assert len(set(first)) == 64
    assert 0 < hub.settled() < most * hub.size(name)
    hub.sent = 0
    assert stream(name, column, tmp_path / "cache") == first
    assert hub.settled() == 0
    # Another machine has the same examples.
    assert stream(name, column, tmp_path / "other") == first
    assert hub.settled() > 0


def test_a_network_that_fails_on_the_way_is_one_line_and_nothing_is_kept(hub, stream, tmp_path):
    hub.faults = [Fault("GET", "user/old/resolve/.*parquet", 403, times=1000, skip=20)]
    said = stream("user/old", "label", tmp_path)
    hub.faults = []
    assert said.startswith("--dataset_name user/old cannot be streamed: ")
    assert "\n" not in said
    assert [path.suffix for path in (tmp_path / "cap_hf").iterdir()] == [".lock"]
    assert len(stream("user/old", "label", tmp_path)) == 64


def test_a_new_commit_is_streamed_anew(hub, stream, tmp_path):
    hub.datasets["user/new"] = write_parquet(tmp_path / "d", shards=1, count=100, classes=2, old=True)
    first = stream("user/new", "label", tmp_path / "cache")
    write_parquet(tmp_path / "d", shards=1, count=200, classes=2, old=True)
    assert max(first) < 100 <= max(stream("user/new", "label", tmp_path / "cache"))
