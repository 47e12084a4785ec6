"""What is streamed is a matter of the dataset and the seed: places in turn, a buffer, and a part that is held out."""

import time
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from support.image_files import write_parquet, write_tars

from cap_hf.data import streaming
from cap_hf.data.streaming import Streamer, buffered, in_turn


def place(name, count, opened=None, closed=None, delay=0.0):
    """A place of examples `(name, 0)`, `(name, 1)` and so on."""
    if opened is not None:
        opened.append(name)
    try:
        for index in range(count):
            time.sleep(delay)
            yield {"id": (name, index)}
    finally:
        if closed is not None:
            closed.append(name)


def ids(examples):
    return [example["id"] for example in examples]


def test_places_take_turns_and_make_room_for_others(monkeypatch):
    monkeypatch.setattr(streaming, "PLACES", 2)
    sizes = {"a": 3, "b": 1, "c": 2, "d": 0}
    places = (partial(place, name, size) for name, size in sizes.items())
    expected = [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("c", 0), ("c", 1)]
    assert ids(in_turn(places)) == expected


def test_the_order_is_not_that_of_the_network():
    delays = {"a": 0.02, "b": 0.0, "c": 0.01}
    slow = ids(in_turn(partial(place, name, 3, delay=delay) for name, delay in delays.items()))
    assert slow == ids(in_turn(partial(place, name, 3) for name in delays))


def test_no_more_places_are_opened_than_are_read_and_all_are_closed(monkeypatch):
    monkeypatch.setattr(streaming, "PLACES", 3)
    opened, closed = [], []
    examples = in_turn(partial(place, number, 4, opened, closed) for number in range(10))
    assert len(list(islice(examples, 3))) == 3
    examples.close()
    assert sorted(opened) == sorted(closed) == [0, 1, 2]


def test_an_error_in_a_place_is_passed_on():
    def broken():
        yield {"id": 0}
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        list(in_turn(iter([partial(place, "a", 9), broken])))


def test_a_buffer_loses_and_repeats_nothing():
    for size in (0, 1, 4, 100):
        shuffled = list(buffered(iter(range(20)), size, np.random.default_rng(0)))
        assert sorted(shuffled) == list(range(20))
        assert (shuffled == list(range(20))) == (size in (0, 1))
    # To give 5 examples from a buffer of 4, 9 are read.
    source = iter(range(20))
    assert len(list(islice(buffered(source, 4, np.random.default_rng(0)), 5))) == 5
    assert next(source) == 9


@pytest.fixture
def builder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def build(write, **settings):
        return datasets.load_dataset_builder(str(write(tmp_path / "d", **settings)))

    return build


def numbers(streamer, count, seed=0, column="image", **settings):
    """The numbers of the first examples, which are the last bytes of their images."""
    with_labels = [column, "label" if column == "image" else "cls"]
    examples = islice(streamer.read("train", with_labels, seed, **settings), count)
    return [int.from_bytes(example[column]["bytes"][-4:], "big") for example in examples]


def test_rows_come_from_row_groups_all_over_the_files(builder):
    """6 files of 3 row groups of 100: the first 18 examples are the first of each."""
    streamer = Streamer(builder(write_parquet, shards=6, count=1800, classes=9, old=True))
    found = numbers(streamer, 36)
    assert sorted(found[:18]) == [100 * group for group in range(18)]
    # One of each file before another of any.
    assert sorted(number // 300 for number in found[:6]) == list(range(6))
    assert found[18:] == [number + 1 for number in found[:18]]
    assert numbers(streamer, 36, seed=1) != found == numbers(streamer, 36)


def test_rows_of_parquet_are_whole(builder):
    streamer = Streamer(builder(write_parquet, shards=2, count=60, classes=6))
    plain = datasets.load_dataset(str(Path(streamer.builder.base_path)), split="train")
    plain = plain.cast_column("image", datasets.Image(decode=False))
    found = list(streamer.read("train", ["image", "label", "embedding"], 0))
    order = [int.from_bytes(example["image"]["bytes"][-4:], "big") for example in found]
    assert found == [plain[index] for index in order]
    assert sorted(order) == list(range(60))


def test_an_image_that_is_not_there_stays_so(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    split = datasets.Dataset.from_dict({"image": [None, None], "label": [0, 1]}, features=features)
    split.to_parquet(tmp_path / "train.parquet")
    streamer = Streamer(datasets.load_dataset_builder(str(tmp_path)))
    assert list(streamer.read("train", ["image", "label"], 0)) == [{"image": None, "label": n} for n in range(2)]


def test_only_the_columns_asked_for_are_there(builder):
    streamer = Streamer(builder(write_parquet, shards=1, count=20, classes=2))
    example = next(streamer.read("train", ["image"], 0))
    assert list(example) == ["image"]
    assert set(streamer.features("train")) == {"image", "label", "embedding"}


def test_tars_take_turns(builder):
    streamer = Streamer(builder(write_tars, shards=5, count=100, classes=5))
    found = numbers(streamer, 10, column="jpg")
    assert sorted(found[:5]) == [0, 20, 40, 60, 80]
    assert found[5:] == [number + 1 for number in found[:5]]


def test_many_shards_are_read_in_groups(builder, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_GROUPS", 3)
    streamer = Streamer(builder(write_tars, shards=7, count=70, classes=7))
    assert sorted(numbers(streamer, 100, column="jpg")) == list(range(70))


def test_what_is_held_out_and_the_others_are_the_whole(builder):
    streamer = Streamer(builder(write_parquet, shards=2, count=400, classes=4, old=True))
    parts = [numbers(streamer, None, share=0.3, held_out=held) for held in (False, True)]
    assert sorted(parts[0] + parts[1]) == list(range(400))
    assert 80 < len(parts[1]) < 160
    assert numbers(streamer, 10, share=0.3, held_out=True) == parts[1][:10]
