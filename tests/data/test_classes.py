"""Names of classes are understood as people write them; where they are not, the line names those in doubt."""

import re

import datasets
import pytest

from cap_hf.data.classes import ClassNames, key_of, number_in, pair
from cap_hf.errors import CAPError
from cap_hf.notices import warn_once

FASHION = ["T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
IMAGENET = ["tench, Tinca tinca", "crane", "cassette player", "crane", "missile", "projectile, missile"]
DEFAULT = [f"LABEL_{number}" for number in range(12)]
AS_TEXT = sorted(map(str, range(12)))


@pytest.fixture(autouse=True)
def _unsaid():
    warn_once.cache_clear()


def paired(names, model):
    return pair(names, ClassNames(dict(enumerate(model))), "label")


def test_spellings_and_numbers():
    assert key_of("T-shirt_TOP") == key_of("T - shirt / top")
    assert key_of("Straße") == key_of("STRASSE")
    assert key_of("a\u0308pfel") == key_of("\u00c4pfel")  # folders on a Mac have letters in pieces
    assert [number_in(name) for name in ("3", "03", " 12 ", "LABEL_3", "label 3")] == [3, 3, 12, 3, 3]
    assert [number_in(name) for name in ("-1", "1-2", "3.0", "3a", "", "labels", "²x")] == [None] * 7
    assert key_of("-1") != key_of("1")
    assert key_of("-") != key_of("_")


@pytest.mark.parametrize(
    ("names", "model", "expected"),
    [
        # In another order; in other spellings; some of the model's; one of several synonyms.
        (["c", "a", "b"], ["a", "b", "c"], [2, 0, 1]),
        (
            sorted(name.replace(" / ", "-").replace(" ", "") for name in FASHION),
            FASHION,
            [9, 8, 4, 3, 2, 5, 6, 7, 0, 1],
        ),
        (["dog", "owl"], ["cat", "dog", "owl"], [1, 2]),
        (["cassette_player", "tench"], IMAGENET, [2, 0]),
        (["Tinca tinca, tench"], IMAGENET, [0]),
        # A name that is the model's own is not taken for another spelling, or for a synonym.
        (["A", "a", "missile"], ["a", "A", "projectile, missile", "missile"], [1, 0, 3]),
        # Numbers, sorted as text, for models that have names, none, or these.
        (AS_TEXT, DEFAULT, [int(name) for name in AS_TEXT]),
        (AS_TEXT, [f"class {letter}" for letter in "abcdefghijkl"], [int(name) for name in AS_TEXT]),
        (AS_TEXT, AS_TEXT, list(range(12))),
        (["10", "LABEL_02"], AS_TEXT, [2, 4]),
        (["1", "2", "3"], ["1", "2", "3"], [0, 1, 2]),
        (["00", "01", "10"], DEFAULT, [0, 1, 10]),
        # Nothing contradicts that they are paired by number.
        (["cat", "1"], ["cat", "dog"], [0, 1]),
    ],
)
def test_pairs(names, model, expected, caplog):
    assert paired(names, model) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "model", "said"),
    [
        (["n01440764", "n02012849"], ["tench", "crane"], "2 of the 2 .*: n01440764 for tench, n02012849 for crane. If"),
        (["cat", "dog"], DEFAULT[:2], "2 of the 2 .*: cat for LABEL_0, dog for LABEL_1. If"),
        (["0", "1", "A", "B"], DEFAULT[:4], "2 of the 4 .*: A for LABEL_2, B for LABEL_3. If"),
        (["no", "yes"], ["0", "1"], ": no for 0, yes for 1. If"),
        (["chat", "cheval", "chien"], ["cat", "dog", "horse"], "chat for cat, cheval for dog, chien for horse. If"),
        # Numbers in names that stand in their order, and a number that is no synonym.
        ([f"class{number}" for number in range(10)], DEFAULT[:10], "class0 for LABEL_0, class1 for LABEL_1, class2"),
        (["0.0", "1.0", "2.0"], DEFAULT[:3], "0.0 for LABEL_0"),
        (["c0", "c1", "c10", "c2"], ["nr 0", "nr 1", "nr 10", "nr 2"], "c10 for nr 10"),
        (["grade 2", "grade 4"], ["mild", "severe"], "grade 2 for mild, grade 4 for severe. If"),
        (["cat, 1", "dog, 0"], DEFAULT[:2], "cat, 1 for LABEL_0, dog, 0 for LABEL_1. If"),
        (["Hund", "Katze", "Maus", "Vogel"], ["dog", "cat", "mouse", "bird"], "Maus for mouse ... .4 in all.. If"),
        # As `datasets` has ImageNet-1k, where the model calls two classes the same.
        (["tench", "crane", "cassette player", "crane2", "missile", "projectile"], IMAGENET, "crane2 for crane. If"),
    ],
)
def test_other_words_are_paired_by_number_and_one_line_shows_how(names, model, said, caplog):
    for _ in range(3):
        assert paired(names, model) == list(range(len(names)))
    assert len(caplog.records) == 1
    assert re.search(said, caplog.records[0].getMessage())


@pytest.mark.parametrize(
    ("names", "model", "said"),
    [
        (["airplane", "frog", "lorry"], ["truck", "frog", "airplane"], "the model has 3: .*, but not lorry: name each"),
        (["dog", "fox"], ["cat", "dog", "owl"], "but not fox: name each"),
        (["a", "b", "c"], ["a", "b"], "but not c: name each"),
        (["x", "y"], ["a", "b", "c"], r"has 2 classes \(x, y\), the model has 3: a, b, c, none of these names: name"),
        (["0", "1", "12"], DEFAULT, "but not 12: "),
        (["100", "200", "300"], DEFAULT[:3], "none of these names"),
        (
            ["1", "10", "11", "12", *"23456789"],
            DEFAULT,
            "'label' counts the classes from 1 to 12, the model counts from 0",
        ),
        (["1", "2", "3"], ["cat", "dog", "owl"], "'label' counts the classes from 1 to 3, the model counts from 0"),
        (["1", "cat"], ["cat", "dog"], r"'label' mixes names \(cat\) and numbers \(1\): name each"),
        # As folders are sorted; from 1.
        (
            sorted(f"class{n}" for n in range(1, 11)),
            DEFAULT[:10],
            "has class10 before class2, against their .*: call the",
        ),
        (sorted(f"Nr. {n}" for n in range(12)), DEFAULT, "has Nr. 11 before Nr. 2, against"),
        (sorted(f"c{n}" for n in range(11)), [f"klasse {n}" for n in range(11)], "has c10 before c2, against"),
        (sorted(f"{n}th" for n in range(12)), DEFAULT, "has 11th before 1th, against"),
        (["1.0", "2.0", "0.0"], DEFAULT[:3], "has 2.0 before 0.0, against"),
        (["other", "t1", "t10", "t2"], DEFAULT[:4], "has t10 before t2, against"),
        ([f"class {n}" for n in range(1, 10)], DEFAULT[:9], "counts from class 1 to class 9, not from 0: .* id2label"),
        (["type1", "type2"], ["cat", "dog"], "counts from type1 to type2, not from 0"),
        (["crane", "tench"], IMAGENET, "several classes of the model are called as 'label' has it, crane: name each"),
        (
            ["hot dog", "hot-dog", "tea"],
            ["tea", "hot dog"],
            "several classes of 'label' .*, hot dog, hot-dog: name each",
        ),
        (["1", "01"], DEFAULT, "several classes of 'label' are one class of the model, 1, 01: name each"),
        (["Tea"], ["t-ea", "te a"], "several classes of the model are called as 'label' has it, Tea"),
    ],
)
def test_what_cannot_be_known_is_an_error(names, model, said):
    with pytest.raises(CAPError, match=said):
        paired(names, model)


def test_names_that_datasets_makes_up_are_numbers():
    assert paired(datasets.ClassLabel(num_classes=12).names, DEFAULT) == list(range(12))
