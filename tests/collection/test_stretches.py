"""Calls of layers, and stretches of chains."""

import torch
from torch import nn

from cap_hf.collection.stretches import Call, Chain, Stretch, first_tensor, kept_bytes, stretch_of, tensors_in
from cap_hf.targets import Target


def target(name: str) -> Target:
    return Target(name, nn.Linear(2, 2), 2)


CHAIN = Chain(
    tuple(nn.Identity() for _ in range(4)), tuple(map(frozenset, ("ab", "c", "", "d"))), (10, 20, 30, 40, 50), 3
)
OTHER = Chain((nn.Identity(),), (frozenset("x"),), (100, 1000))


def test_the_stretch_of_targets_is_the_shortest():
    assert stretch_of([OTHER, CHAIN], [target("c")]) == Stretch(CHAIN, 1, 2)
    assert stretch_of([OTHER, CHAIN], [target("b"), target("d")]) == Stretch(CHAIN, 0, 4)
    assert stretch_of([OTHER, CHAIN], [target("x")]) == Stretch(OTHER, 0, 1)


def test_stretches_begin_and_end_where_states_are_kept():
    """States of fewer layers take less memory; those in between are gone through."""
    for names, places in (("c", (0, 2)), ("d", (2, 4)), ("bd", (0, 4))):
        assert stretch_of([CHAIN], [target(name) for name in names], 2) == Stretch(CHAIN, *places)
    assert stretch_of([CHAIN], [target("d")], 3) == Stretch(CHAIN, 3, 4)
    assert stretch_of([CHAIN], [target("c")], 9) == Stretch(CHAIN, 0, 4)


def test_targets_of_two_chains_or_of_none_have_no_stretch():
    assert stretch_of([OTHER, CHAIN], [target("c"), target("x")]) is None
    assert stretch_of([OTHER, CHAIN], [target("c"), target("elsewhere")]) is None
    assert stretch_of([], [target("c")]) is None


def test_a_place_is_counted_once_before_and_once_behind():
    first, second = Stretch(CHAIN, 0, 2), Stretch(CHAIN, 1, 4)
    assert kept_bytes([first, None, first]) == 10 + 30 + 3
    # Two passes that share the layer in between.
    assert kept_bytes([first, second]) == 10 + 20 + 30 + 50 + 3
    assert kept_bytes([first, Stretch(OTHER, 0, 1)]) == 10 + 30 + 3 + 100 + 1000
    assert kept_bytes([None]) == 0


def test_hidden_states_are_the_first_argument_whatever_it_is_called():
    hidden, mask = torch.ones(2, 3), torch.zeros(2)

    class Layer(nn.Module):
        def forward(self, hidden_states, mask=None, scale=1):
            return (hidden_states * scale, mask)

    for args, kwargs in (((hidden, mask), {"scale": 3}), ((), {"hidden_states": hidden, "mask": mask, "scale": 3})):
        call = Call.of(args, kwargs)
        assert call.hidden is hidden
        assert call.others == [mask]
        assert torch.equal(call.on(Layer()), 3 * hidden)
        assert torch.equal(call.with_hidden(2 * hidden).on(Layer()), 6 * hidden)
    assert Call.of((None,), {}) is None
    assert Call.of((), {"output_attentions": True}) is None
    assert Call.of((), {}) is None


def test_calls_are_light_unless_they_bring_much_or_want_gradients():
    hidden = torch.ones(2, 3)
    assert Call(hidden, (torch.ones(6), None)).is_light
    assert not Call(hidden, (torch.ones(7),)).is_light
    assert not Call(hidden, (), {"a": [torch.ones(1, requires_grad=True)]}).is_light


def test_tensors_are_found_in_whatever_holds_them():
    a, b = torch.ones(1), torch.ones(2)
    assert tensors_in({"x": (a, [None, {"y": b}]), "z": 3}) == [a, b]
    assert first_tensor((a, b)) is a
    assert first_tensor(b) is b
