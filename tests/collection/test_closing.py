"""Tries that are corrected by what was measured before, on functions that say what would be measured."""

import pytest

from cap_hf.collection.closing import MOST_TRIES, TOLERANCE, Try, close_in, nearest, next_prediction


def tries_of(measure, wanted, error=0.0, known=None):
    """What is tried where a prediction is met exactly, and measured as a function says."""
    asked = []

    def attempt(share):
        asked.append(share)
        return Try(len(asked), share, measure(share), error)

    known = [(0.1, measure(0.1)), (1.0, measure(1.0))] if known is None else known
    return close_in(attempt, wanted, known), asked


def test_a_factor_and_a_constant_are_found_at_once():
    tries, asked = tries_of(lambda share: 0.3 + 0.7 * share, 0.65)
    assert asked == [pytest.approx(0.5)]
    assert tries[-1].meets(0.65)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("measure", [lambda share: share**2, lambda share: share**0.3, lambda share: 0.2 + 0.8 * share])
def test_what_is_not_straight_is_met_within_a_hundredth(measure, part):
    wanted = measure(0.1) + part * (1 - measure(0.1))
    tries, _ = tries_of(measure, wanted)
    assert abs(tries[-1].measured - wanted) <= TOLERANCE * wanted
    assert nearest(tries, wanted) == tries[-1]
    assert not any(each.meets(wanted) for each in tries[:-1])


def test_over_a_jump_both_of_its_edges_are_found_and_the_lower_one_is_taken():
    tries, _ = tries_of(lambda share: share if share < 0.5 else share + 0.3, 0.6)
    assert len(tries) == MOST_TRIES
    assert not any(each.meets(0.6) for each in tries)
    best = nearest(tries, 0.6)
    assert best.measured == max(each.measured for each in tries if each.measured < 0.6)


def test_one_that_keeps_to_what_was_asked_for_is_taken_before_a_nearer_one_that_does_not():
    tries = [Try(1, 0.9, 1.25, 0.01), Try(2, 0.3, 0.37, 0.01), Try(3, 0.2, 0.3, 0.01)]
    assert nearest(tries, 0.9) == tries[1]
    assert nearest(tries[:1], 0.9) == tries[0]


def test_what_is_measured_slower_than_dense_is_not_tried_again():
    # Sparse layers that gain nothing until far more is gone, as those of small models.
    tries, asked = tries_of(lambda share: 1.0 if share == 1 else 1.02 if share > 0.4 else 0.3 + 1.2 * share, 0.7)
    assert tries[0].measured > 1
    assert len(set(asked)) == len(asked)
    assert abs(nearest(tries, 0.7).measured - 0.7) <= TOLERANCE * 0.7


def test_noise_ends_the_tries_where_it_is_larger_than_what_is_missing():
    tries, _ = tries_of(lambda share: share**2, 0.5, error=0.21)
    assert len(tries) == 1
    assert abs(tries[0].measured - 0.5) > TOLERANCE * 0.5


def test_what_is_made_again_is_not_measured_for_ever():
    asked = []

    def attempt(share):
        asked.append(share)
        return Try(None, 0.7, 0.8, 0.0)

    assert len(close_in(attempt, 0.5, [(0.1, 0.1), (1.0, 1.0)])) == 2


def test_where_all_that_is_known_takes_more_the_least_is_tried():
    assert next_prediction([(1.0, 1.0), (0.2, 0.31)], 0.3) == 0.2
