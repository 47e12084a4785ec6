"""Choosing by measuring: a layer that wins is taken, one that cannot is not, and equal layers are measured once."""

import pytest
import torch
from torch import nn

from cap_hf.inference import choice
from cap_hf.inference.choice import is_faster, is_semi_structured_faster, time_in_turns
from cap_hf.inference.int8_linear import DenseInt8Linear, SparseInt8Linear
from cap_hf.inference.linear import CSRLinear, SparseLinear
from cap_hf.inference.operators import has_int8_kernel, has_kernel


def make_linear(share):
    """A Linear of 768 x 768 of whose weights a share is 0."""
    linear = nn.Linear(768, 768)
    with torch.no_grad():
        linear.weight[torch.rand(768, 768, generator=torch.Generator().manual_seed(0)) < share] = 0
    return linear


def test_measured_choice_takes_a_layer_that_wins_and_leaves_one_that_cannot():
    assert has_kernel()
    almost_empty = make_linear(0.98)
    assert is_faster(SparseLinear, almost_empty, 197)
    assert not is_faster(CSRLinear, make_linear(0.22), 197)
    before = choice.measured_faster.cache_info().hits
    assert is_faster(SparseLinear, almost_empty, 197)
    assert choice.measured_faster.cache_info().hits == before + 1


def test_a_layer_with_few_zeros_is_not_measured(monkeypatch):
    def measured_faster(*args):
        raise AssertionError("measured")

    monkeypatch.setattr(choice, "measured_faster", measured_faster)
    assert not is_faster(SparseLinear, make_linear(0.15), 197)


def test_what_decides_is_the_sparsity_rounded_down_and_the_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "measured_faster", lambda *args: bool(asked.append(args)))
    is_faster(CSRLinear, make_linear(0.78), 50)
    assert asked == [(CSRLinear, 768, 768, 50, 15, True, torch.get_num_threads())]  # 15 steps of 5 %


@pytest.mark.parametrize(("sparse_seconds", "faster"), [(0.9, True), (0.96, False), (1.2, False)])
def test_in_doubt_nothing_is_changed(monkeypatch, sparse_seconds, faster):
    monkeypatch.setattr(choice, "time_in_turns", lambda *args: [[1.0] * 3, [sparse_seconds] * 3])
    choice.measured_faster.cache_clear()
    assert choice.measured_faster(CSRLinear, 8, 8, 1, 10, False, 1) is faster
    monkeypatch.setattr(choice, "to_semi_structured", lambda linear: None)
    assert is_semi_structured_faster(nn.Linear(8, 8), 4) is faster
    choice.measured_faster.cache_clear()


def test_turns_are_taken_in_order():
    order = []
    times = time_in_turns([lambda: order.append("a"), lambda: order.append("b")], runs=4)
    assert order == ["a", "b"] * 5  # the first of each is not counted
    assert [len(each) for each in times] == [4, 4]
    assert len(time_in_turns([lambda: None], runs=100, seconds=0.0)[0]) == 3


def test_a_pause_lies_before_each_run_and_is_not_timed(monkeypatch):
    pauses = []
    monkeypatch.setattr(choice.time, "sleep", pauses.append)
    time_in_turns([lambda: None, lambda: None], runs=3, pause=0.25)
    assert pauses == [0.25] * 6


def test_a_warm_turn_begins_with_a_run_that_is_not_timed():
    order = []
    times = time_in_turns([lambda: order.append("a"), lambda: order.append("b")], runs=3, warm=True)
    assert order == ["a", "b", *["a", "a", "b", "b"] * 3]
    assert [len(each) for each in times] == [3, 3]


def test_the_least_of_all_runs_decides(monkeypatch):
    """Other work on the machine makes some runs slower, and more so those of two threads."""
    monkeypatch.setattr(choice, "time_in_turns", lambda *args: [[1.0, 1.0, 1.0], [9.0, 0.5, 9.0]])
    choice.measured_faster.cache_clear()
    assert choice.measured_faster(CSRLinear, 8, 8, 1, 10, False, 1)
    choice.measured_faster.cache_clear()


SECONDS = {nn.Linear: 1.0, SparseLinear: 0.8, SparseInt8Linear: 0.5, DenseInt8Linear: 0.6}


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({}, SparseInt8Linear),
        ({DenseInt8Linear: 0.4}, DenseInt8Linear),
        ({SparseInt8Linear: 0.78, DenseInt8Linear: 0.9}, SparseLinear),  # faster by less than 5 %
        ({SparseLinear: 0.97, SparseInt8Linear: 0.96, DenseInt8Linear: 0.96}, None),
        # Faster than dense by 5 %, but not than an exact layer that is itself not faster by so much.
        ({SparseLinear: 0.955, SparseInt8Linear: 0.949, DenseInt8Linear: 0.96}, None),
    ],
)
def test_the_fastest_of_all_layers_is_taken_and_in_doubt_the_exact_one(monkeypatch, changed, kind):
    assert has_int8_kernel()
    assert has_kernel()
    seconds = SECONDS | changed
    monkeypatch.setattr(choice, "has_dense_int8", lambda: True)
    monkeypatch.setattr(choice, "measure", lambda layers, *_: [seconds[type(layer)] for layer in layers])
    choice.measured_kind.cache_clear()
    assert choice.measured_kind(8, 8, 1, 10, 10, False, 1) is kind
    choice.measured_kind.cache_clear()


def test_few_zeros_leave_dense_int8_and_dense(monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "has_dense_int8", lambda: False)
    monkeypatch.setattr(choice, "measure", lambda layers, *_: asked.extend(map(type, layers)) or [1.0, 0.5])
    choice.measured_kind.cache_clear()
    assert choice.measured_kind(8, 8, 1, 2, 0, False, 1) is SparseInt8Linear
    assert asked == [nn.Linear, SparseInt8Linear]
    choice.measured_kind.cache_clear()


def test_what_decides_for_int8_is_also_the_share_of_empty_words(monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "measured_kind", lambda *args: asked.append(args))
    linear = nn.Linear(10, 40, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.weight[:, 4:8] = 0  # one word of three
        linear.weight[:, 0] = 0
    assert choice.fastest_kind(linear, 7) is None
    assert asked == [(40, 10, 7, 10, 6, False, torch.get_num_threads())]


@pytest.mark.parametrize(("steps", "word_steps"), [(15, 15), (15, 10), (10, 0), (20, 20), (0, 0)])
def test_weights_to_measure_with_have_the_zeros_that_are_asked_for(steps, word_steps):
    weight = choice.random_linear(300, 402, steps, word_steps, True).weight
    assert abs(float((weight == 0).float().mean()) - steps * choice.STEP) < 0.02
    words = (weight[:, :400].view(300, 100, 4) == 0).all(dim=2).float().mean()
    assert float(words) >= word_steps * choice.STEP - 0.02
