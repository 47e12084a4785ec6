"""What counts as a score, and the difference of two."""

import math

import pytest
import torch

from cap_hf.collection.scores import Score, drop_of, read_score, size_of, value_of
from cap_hf.errors import CAPError


def test_a_drop_is_that_of_the_means_and_its_error_that_of_the_differences():
    dense, other = torch.tensor([1.0, 1, 0, 1, 1]), torch.tensor([1.0, 0, 1, 1, 0])
    drop, error = drop_of(read_score(dense, "a"), read_score(other, "b"))
    differences = [0.0, 1, -1, 0, 1]
    mean = sum(differences) / 5
    assert drop == pytest.approx(mean, rel=1e-15)
    assert error == pytest.approx(math.sqrt(sum((each - mean) ** 2 for each in differences) / 5 / 5), rel=1e-12)
    assert drop_of(dense.double(), dense.double()) == (0.0, 0.2)
    assert drop_of(0.75, 0.5) == (0.25, None)
    assert drop_of(Score(0.75, 3.0), Score(0.5, 4.0)) == (0.25, 5.0)


def test_images_that_do_not_differ_prove_little():
    """The error is not 0: one image more that differs would change the drop by 1 / n. One image alone has none."""
    ones = torch.ones(100).double()
    assert drop_of(ones, ones) == (0.0, 0.01)
    assert drop_of(ones[:1], ones[:1] - 1) == (1.0, None)


def test_scores_are_read():
    hits = read_score(torch.tensor([True, False, True, True]), "a")
    assert (value_of(hits), size_of(hits), hits.dtype) == (0.75, 4, torch.float64)
    assert read_score(torch.tensor(0.5), "a") == 0.5
    assert read_score(1, "a") == 1.0
    assert (value_of(Score(0.5, 0.1)), size_of(Score(0.5, 0.1)), size_of(0.5)) == (0.5, None, None)


@pytest.mark.parametrize(
    ("score", "line"),
    [
        ("good", "evaluate gives it 'good': return a number, a Score, or a tensor"),
        (None, "evaluate gives it None"),
        (True, "evaluate gives it True"),
        (math.nan, "a score that is not finite"),
        (torch.tensor([0.0, math.inf]), "a score that is not finite"),
        (Score(0.5, math.nan), "a score that is not finite"),
        (Score(math.inf, 0.1), "a score that is not finite"),
        (torch.zeros(2, 2), r"scores of shape \(2, 2\)"),
        (torch.zeros(0), r"scores of shape \(0,\)"),
    ],
)
def test_what_is_none_is_named(score, line):
    with pytest.raises(CAPError, match=line):
        read_score(score, "it")


@pytest.mark.parametrize("others", [(torch.zeros(3), torch.zeros(4)), (0.5, Score(0.5, 0.1)), (torch.zeros(3), 0.5)])
def test_scores_of_different_kinds_are_not_compared(others):
    with pytest.raises(CAPError, match="the same images in the same way each time"):
        drop_of(*others)
