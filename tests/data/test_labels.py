"""Labels are numbered as the model has them, example by example; what contradicts is named in one line."""

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig

from cap_hf.data.arguments import DataArguments
from cap_hf.data.labels import LabelNumbers, find_columns
from cap_hf.errors import CAPError
from cap_hf.notices import warn_once


def config_of(names) -> ViTConfig:
    return ViTConfig(
        num_channels=1, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )


def numbers(feature, values, config):
    split = datasets.Dataset.from_dict({"label": values}, features=datasets.Features(label=feature))
    return LabelNumbers(split, "label", config)(split["label"][:], list(range(len(values)))).tolist()


def test_labels_that_are_not_the_models():
    config = config_of(["a", "b", "c"])
    names = datasets.ClassLabel(names=["c", "a", "b"])
    assert numbers(names, [0, 1, 2], config) == [2, 0, 1]
    others = datasets.ClassLabel(names=["x", "y", "z"])
    assert numbers(others, [0, 1, 2], config) == [0, 1, 2]
    assert numbers(datasets.ClassLabel(names=["b", "c"]), [0, 1], config) == [1, 2]
    with pytest.raises(
        CAPError, match=r"'label' has 2 classes \(x, y\), the model has 3: a, b, c, none of these names"
    ):
        numbers(datasets.ClassLabel(names=["x", "y"]), [0], config)
    strings = datasets.Value("string")
    assert numbers(strings, ["b", "a"], config) == [1, 0]
    with pytest.raises(CAPError, match=r"example 1 has label 'q' in 'label', the model has 3: a, b, c"):
        numbers(strings, ["b", "q"], config)
    config.label2id = {"a": "0", "b": "1", "c": "2"}  # as run_image_classification.py once wrote them
    assert numbers(names, [0, 1, 2], config) == [2, 0, 1]
    assert numbers(strings, ["b", "a"], config) == [1, 0]
    integers = datasets.Value("int32")
    assert numbers(integers, [2, 0], config) == [2, 0]
    for wrong in (3, -1, None):
        with pytest.raises(CAPError, match=f"example 1 has label {wrong} in 'label', the model has 3"):
            numbers(integers, [0, wrong], config)
    for wrong in (-1, None):
        with pytest.raises(CAPError, match=f"example 1 has label {wrong}"):
            numbers(names, [0, wrong], config)
    with pytest.raises(CAPError, match="not labels"):
        numbers(datasets.Value("float32"), [0.5], config)


def test_text_is_taken_by_name_or_by_number():
    text, default = datasets.Value("string"), ViTConfig(num_labels=12)
    imagenet = config_of(["tench, Tinca tinca", "crane", "crane", "sports car, sport car"])
    assert numbers(text, ["10", "03", "LABEL_2"], default) == [10, 3, 2]
    assert numbers(text, ["2", "0"], config_of(["cat", "dog", "owl"])) == [2, 0]
    assert numbers(text, ["Sport_Car", "TENCH"], imagenet) == [3, 0]
    # As finetuning on folders names them, in the order of their names.
    assert numbers(text, ["10", "2"], config_of(sorted(map(str, range(12))))) == [2, 4]
    with pytest.raises(CAPError, match="example 1 has label 'crane' in 'label', the model has 4"):
        numbers(text, ["tench", "crane"], imagenet)
    with pytest.raises(CAPError, match=r"'label' mixes names \(cat\) and numbers \(1\): name each"):
        numbers(text, ["cat", "1"], config_of(["cat", "dog"]))
    with pytest.raises(CAPError, match="example 0 has label '12' in 'label', the model has 12"):
        numbers(text, ["12", "0"], default)
    with pytest.raises(CAPError, match="example 0 has label None"):
        numbers(text, [None, "0"], default)


def test_numbers_from_1_are_found_wherever_they_show():
    """All but the last would be taken for the class after theirs, without a word."""
    text, integers, default = datasets.Value("string"), datasets.Value("int64"), ViTConfig(num_labels=3)
    for feature, values in ((text, ["1", "2", "3"]), (integers, [1, 2, 3, -1, None])):
        whole = datasets.Dataset.from_dict({"label": values}, features=datasets.Features(label=feature))
        with pytest.raises(CAPError, match="'label' counts the classes from 1 to 3, the model counts from 0"):
            LabelNumbers(whole.shuffle(seed=0).select([0, 1]), "label", default)
    assert numbers(integers, [1, 2], default) == [1, 2]
    with pytest.raises(CAPError, match="'label' holds numbers, and the model calls its class 0 '1': whether"):
        numbers(integers, [1, 2], config_of(["1", "2", "3"]))


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_a_sample_without_a_0_is_said(kind, caplog):
    """Of a stream there is the sample alone: that its labels count from 1 may not show."""
    warn_once.cache_clear()
    config = config_of(["a", "b", "c", "d"])

    def values(*found):
        return [value if kind == "int64" else str(value) for value in found]

    for few in ([1, 2] * 19, [0, 1] * 20, [2, 3] * 20):
        numbers(datasets.Value(kind), values(*few), config)
    assert not caplog.messages
    assert numbers(datasets.Value(kind), values(*[1, 2] * 20), config)[:2] == [1, 2]
    assert "None of 40 examples has label 0 in 'label': its numbers are taken for the model's" in caplog.text


def test_without_a_head_labels_are_the_datasets_own():
    assert numbers(datasets.ClassLabel(names=["c", "a"]), [0, 1, 1], None) == [0, 1, 1]
    assert numbers(datasets.Value("int64"), [7, 0], None) == [7, 0]
    with pytest.raises(CAPError, match="example 1 has label None in 'label', the dataset numbers its labels from 0"):
        numbers(datasets.Value("string"), ["b", None], None)
    with pytest.raises(CAPError, match="example 0 has label -1 in 'label', the dataset has 2: c, a"):
        numbers(datasets.ClassLabel(names=["c", "a"]), [-1], None)
    with pytest.raises(CAPError, match="example 0 has label -3 in 'label', the dataset numbers its labels from 0"):
        numbers(datasets.Value("int64"), [-3], None)


def test_without_a_head_a_name_has_its_number_in_every_split():
    """Names were numbered split by split: where a class was missing from one, k-NN was 0 % without a word."""
    train = numbers(datasets.Value("string"), ["q", "b", "q", "a"], None)
    test = numbers(datasets.Value("string"), ["b", "q"], None)
    assert train[0] == train[2] == test[1]
    assert train[1] == test[0]
    assert len(set(train)) == 3
    assert min(train) >= 0


class Forbidden(datasets.Image):
    """Images that must not be decoded."""

    def decode_example(self, value, token_per_repo_id=None):
        raise AssertionError("an image was decoded")


@pytest.mark.parametrize("config", [config_of(["a", "b"]), None])
def test_no_image_is_read_for_the_labels(config, monkeypatch):
    """`split[:][column]` of a shuffled split gathered every image of it into memory."""
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    split = datasets.Dataset.from_dict({"image": [image] * 4, "label": ["b", "a", "b", "b"]}, features=features)
    split = split.shuffle(seed=0)
    monkeypatch.setattr(datasets.Image, "decode_example", Forbidden.decode_example)
    read = []
    query = datasets.Dataset._getitem
    monkeypatch.setattr(
        datasets.Dataset, "_getitem", lambda self, key: read.append((self.column_names, key)) or query(self, key)
    )
    LabelNumbers(split, "label", config)
    assert not read


def test_columns_are_found_or_named():
    image, names, text = datasets.Image(), datasets.ClassLabel(names=["a"]), datasets.Value("string")
    found = find_columns(datasets.Features(picture=image, kind=names, text=text), DataArguments())
    assert found == ("picture", "kind")
    assert find_columns(datasets.Features(jpg=image, txt=text), DataArguments()) == ("jpg", None)
    with pytest.raises(CAPError, match="no column 'class': name one of jpg, txt with --label_column_name"):
        find_columns(datasets.Features(jpg=image, txt=text), DataArguments(label_column_name="class"))
    with pytest.raises(CAPError, match="no column 'label': name one of fine, coarse with --label_column_name"):
        find_columns(datasets.Features(jpg=image, fine=names, coarse=names), DataArguments())
    with pytest.raises(CAPError, match="no column 'image': name one of left, right with --image_column_name"):
        find_columns(datasets.Features(left=image, right=image), DataArguments())
    with pytest.raises(CAPError, match="no column 'image': name one of kind, text with --image_column_name"):
        find_columns(datasets.Features(kind=names, text=text), DataArguments())
    with pytest.raises(
        CAPError, match="'image' holds text, not images. .* metadata.csv .* name one of label with --im"
    ):
        find_columns(datasets.Features(image=text, label=names), DataArguments())
