"""Runs that began with the same are told from runs that did not, also where figures happen to agree."""

import pytest
from support.runs import measured, recovered, report

from cap_hf.pages.origins import Origin, agree, group, origin_of, same_place


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("user/vit", "user/vit", True),
        ("user/vit", "other/vit", False),
        ("/data/vit/", "/data/vit", True),
        ("/data/vit", "/other/vit", False),
        ("./vit", "/data/vit", True),
        ("../runs/vit", "/data/runs/vit", True),
        ("runs/vit", "/data/vit", False),
        ("runs/checkpoint-1", "checkpoint-1", True),
        ("", "vit", False),
    ],
)
def test_names_of_one_folder(one, other, same):
    assert same_place(one, other) is same_place(other, one) is same


DENSE = measured(0.92, drop=False)
KNOWN = {"model": "user/vit", "revision": "main", "data": "digits", "split": "test", "images": 400, "sparsity": 0.0}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"model": None, "split": None, "dense": {}}, True),
        ({"model": "user/deit"}, False),
        ({"revision": "v2"}, False),
        ({"data": "mnist"}, False),
        ({"subset": "a"}, True),  # the other one does not say
        ({"split": "validation"}, False),
        ({"images": 50}, False),
        ({"sparsity": 0.5}, False),
        ({"dense": DENSE | {"top1": 0.9201}}, True),  # another machine rounds otherwise
        ({"dense": DENSE | {"top1": 0.9275}}, True),  # 3 of 400 images
        ({"dense": DENSE | {"top1": 0.93}}, False),
        ({"dense": DENSE | {"loss": DENSE["loss"] * 1.009}}, True),
        ({"dense": DENSE | {"loss": DENSE["loss"] * 1.02}}, False),
        ({"dense": DENSE | {"loss": float("nan")}}, False),
        ({"dense": DENSE | {"num_examples": 401}}, False),
        # Of who does not say what it began with, or with how many images, only the figures tell.
        ({"model": None, "dense": DENSE | {"top1": 0.9225}}, False),
        ({"images": None, "dense": DENSE | {"top1": 0.9225}}, False),
        ({"dense": DENSE | {"top1_se": 0.5}}, True),
        ({"dense": {"knn_top1": 0.4}}, True),
    ],
)
def test_what_is_known_of_both_agrees(changes, same):
    one, other = Origin(**KNOWN, dense=DENSE), Origin(**{**KNOWN, "dense": DENSE, **changes})
    assert agree(one, other) is agree(other, one) is same


def test_what_is_no_number_on_both_sides_tells_nothing_apart():
    broken = DENSE | {"loss": float("nan")}
    assert agree(Origin(**KNOWN, dense=broken), Origin(**KNOWN, dense=broken | {"loss": float("nan")}))
    endless = DENSE | {"loss": float("inf")}
    assert agree(Origin(**KNOWN, dense=endless), Origin(**KNOWN, dense=dict(endless)))
    assert not agree(Origin(**KNOWN, dense=endless), Origin(**KNOWN, dense=broken))


def test_what_reports_tell():
    origin = origin_of(report(), {})
    assert (origin.model, origin.data, origin.images, origin.sparsity) == ("user/vit-tiny", "digits", 400, 0.0)
    assert origin.dense == DENSE
    # A recovery began with a pruned model, and its teacher is what that was pruned from.
    origin = origin_of(recovered(), {})
    assert (origin.model, origin.parent, origin.revision) == ("user/vit-tiny", "pruned/sparsity-0.9", None)
    alone = recovered() | {"teacher_model_name_or_path": None, "dense": None}
    origin = origin_of(alone, {"num_examples": 50})
    assert (origin.model, origin.images, origin.sparsity) == (None, 50, None)


def labels(*origins: Origin, parents: list[int | None] | None = None) -> tuple[list[str], list[int]]:
    found, places = group(origins, parents or [None] * len(origins))
    return [each.label for each in found], places


def test_origins_are_named_by_what_differs():
    one, other = Origin("user/vit", data="digits", dense=DENSE), Origin("user/deit", data="digits", dense=DENSE)
    assert labels(one, one) == ([""], [0, 0])
    assert labels(one, other, one) == (["vit", "deit"], [0, 1, 0])
    assert labels(one, Origin("other/vit", data="digits")) == (["user/vit", "other/vit"], [0, 1])
    assert labels(one, Origin("user/vit", data="mnist")) == (["on digits", "on mnist"], [0, 1])
    few = Origin("user/vit", images=50), Origin("user/vit", images=400)
    assert labels(*few) == (["50 images", "400 images"], [0, 1])
    # Of one name, trained on in between.
    trained = Origin("user/vit", data="digits", dense=DENSE | {"top1": 0.95})
    assert labels(one, trained) == (["from 92.00 %", "from 95.00 %"], [0, 1])
    assert labels(Origin("user/vit", dense={"loss": 1.0}), Origin("user/vit", dense={"loss": 2.0})) == (
        ["(1)", "(2)"],
        [0, 1],
    )


def test_who_does_not_say_where_it_began_belongs_to_its_parent():
    one, other = Origin("user/vit", dense=DENSE), Origin("user/deit", dense=DENSE)
    unknown = Origin(parent="deit-pruned/sparsity-0.9", images=400)
    assert labels(unknown, one, other, parents=[2, None, None]) == (["vit", "deit"], [1, 0, 1])
    # Or to the only one there is; of two it would be a guess.
    assert labels(unknown, one) == ([""], [0, 0])
    names, places = labels(unknown, one, other)
    assert places == [2, 0, 1]
    assert names[2] == "sparsity-0.9 400 images"


def test_a_name_that_may_be_of_two_models_is_left_by_itself():
    one, other = Origin("user/vit", dense=DENSE), Origin("other/vit", dense=DENSE)
    short = Origin("vit", dense=DENSE)
    for runs, expected in (
        ([one, other, short, one], [0, 1, 2, 0]),
        # Whatever comes first.
        ([short, one, other, one], [2, 0, 1, 0]),
        ([one, short, short, other], [0, 2, 2, 1]),
    ):
        names, places = labels(*runs)
        assert places == expected
        assert names == ["user/vit", "other/vit", "vit"]
    assert labels(short, one, short) == ([""], [0, 0, 0])
    # What was not measured is not known to be one.
    assert labels(Origin("vit"), one, other, Origin("vit"))[1] == [2, 0, 1, 3]
