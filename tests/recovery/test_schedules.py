"""Sparsity schedules and the learning rate that restarts with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cap_hf.errors import CAPError
from cap_hf.recovery.schedules import SparsitySchedule, cyclic_linear


def test_a_linear_schedule_rises_evenly():
    schedule = SparsitySchedule.parse("0.5,0.9,5,linear")
    assert [sparsity for _, sparsity in schedule.steps] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert schedule.at_steps(100, 7) == pytest.approx({0: 0.5, 20: 0.6, 40: 0.7, 60: 0.8, 80: 0.9})


def test_a_cubic_schedule_is_zhu_and_guptas():
    start, end = 0.5, 0.9
    schedule = SparsitySchedule.parse(f"{start},{end},5,cubic")
    expected = [end + (start - end) * (1 - t) ** 3 for t in (0, 0.25, 0.5, 0.75, 1)]
    assert [sparsity for _, sparsity in schedule.steps] == pytest.approx(expected)
    # Exactly what was asked for: it decides how many weights are removed.
    assert schedule.steps[-1][1] == end


def test_one_step_is_one_shot():
    for text in ("0.9", "0.5,0.9,1,cubic"):
        assert SparsitySchedule.parse(text).at_steps(10, 1) == {0: 0.9}


def test_a_list_of_epochs():
    schedule = SparsitySchedule.parse("0:0.5, 1.5:0.7, 4:0.9")
    assert schedule.in_epochs
    assert schedule.at_steps(100, 10) == {0: 0.5, 15: 0.7, 40: 0.9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.9,0.5,4,linear", "goes down, from 0.9 to 0.5"),
        ("0:0.5,1:0.4", "from 0.5 to 0.4"),
        ("0:0.5,1:0.5", "can only rise"),
        ("1:0.5,0:0.6", "epoch 0 after epoch 1: sort it"),
        ("0.5,1.0,4,linear", r"sparsity 1 of the schedule is not in \[0, 1\)"),
        ("0.5,0.9,4,square", "'square' is not one of linear, cubic"),
        ("0.5,0.9,0,linear", "at least 1"),
        ("0.5,0.9", "is not 'start,end,steps,shape'"),
        ("0.5,0.9,two,linear", "is not 'start,end,steps,shape'"),
        ("0:0.5,0.9", "is not 'start,end,steps,shape'"),
        ("", "is not 'start,end,steps,shape'"),
        ("-1:0.5", "use times from 0"),
        ("nan", r"is not in \[0, 1\)"),
    ],
)
def test_what_is_no_schedule_is_one_line(text, message):
    with pytest.raises(CAPError, match=message) as caught:
        SparsitySchedule.parse(text)
    assert "\n" not in str(caught.value)


def test_a_step_behind_the_end_is_an_error():
    with pytest.raises(CAPError, match="prunes at epoch 12, but training ends at 10"):
        SparsitySchedule.parse("0:0.5,12:0.9").at_steps(100, 10)


def test_two_steps_at_once_are_an_error():
    with pytest.raises(CAPError, match="twice at optimizer step"):
        SparsitySchedule.parse("0.1,0.9,8,linear").at_steps(4, 1)


def test_the_start_is_compared_to_the_weight():
    schedule = SparsitySchedule.parse("0.6")
    schedule.check_start(num_zeros=602, num_weights=1003)
    with pytest.raises(CAPError, match=r"starts at sparsity 0\.6, but the model is"):
        schedule.check_start(num_zeros=603, num_weights=1003)


@given(
    start=st.floats(0, 0.5),
    rise=st.floats(0.01, 0.49),
    steps=st.integers(1, 12),
    shape=st.sampled_from(["linear", "cubic"]),
    max_steps=st.integers(24, 1000),
)
def test_every_shaped_schedule_rises_to_its_end(start, rise, steps, shape, max_steps):
    found = SparsitySchedule.shaped(start, start + rise, steps, shape).at_steps(max_steps, 1)
    assert len(found) == steps
    assert list(found) == sorted(found)
    assert list(found.values()) == sorted(found.values())
    assert next(iter(found)) == 0
    assert found[max(found)] == start + rise


def test_the_learning_rate_restarts_with_each_cycle():
    factor = cyclic_linear([0, 4], 10, peak_decay=0.5)
    assert [factor(step) for step in range(11)] == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0.5, 0.5 * 5 / 6, 0.5 * 4 / 6, 0.5 * 3 / 6, 0.5 * 2 / 6, 0.5 / 6, 0]
    )


def test_a_cycle_ends_where_it_is_told_to():
    factor = cyclic_linear([0, 4], 8, end=0.2)
    assert [factor(step) for step in range(9)] == pytest.approx([1, 0.8, 0.6, 0.4, 1, 0.8, 0.6, 0.4, 0.2])
    # A peak that has decayed below the end is the end.
    assert [cyclic_linear([0, 1, 2], 4, peak_decay=0.4, end=0.2)(step) for step in range(5)] == pytest.approx(
        [1, 0.4, 0.2, 0.2, 0.2]
    )


def test_a_first_pruning_step_later_ends_a_dense_cycle():
    factor = cyclic_linear([5], 10)
    assert factor(0) == factor(5) == 1
    assert factor(4) == pytest.approx(0.2)


def test_warmup_rises_once_and_then_decays():
    factor = cyclic_linear([0, 6], 12, num_warmup_steps=2)
    assert [factor(step) for step in range(8)] == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 1, 5 / 6])


@given(st.lists(st.integers(1, 99), max_size=6), st.integers(0, 20), st.floats(0.1, 1))
def test_the_learning_rate_stays_in_bounds(starts, warmup, decay):
    factor = cyclic_linear(starts, 100, warmup, decay)
    values = [factor(step) for step in range(101)]
    assert all(0 <= value <= 1 for value in values)
    assert values[-1] == 0
