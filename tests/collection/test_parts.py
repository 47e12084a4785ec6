"""Parts of what each process owns of a target."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import ARCHITECTURES, build
from torch import nn

from cap_hf.collection.parts import join, key_of, parts_of, within
from cap_hf.collection.shares import chunk_shares, own_blocks
from cap_hf.distributed.processes import Processes
from cap_hf.targets import Target, find_targets


def one_of(world: int, rank: int) -> Processes:
    """One of several processes, which no backend connects."""
    made = Processes()
    made.world, made.rank = world, rank
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
@given(world=st.integers(1, 4), count=st.integers(1, 9), size=st.sampled_from([4, 24, 64]))
@settings(max_examples=20, deadline=None)
def test_parts_are_what_a_process_owns_each_chunk_once(name, world, count, size):
    for target in find_targets(build(name), size):
        parts = parts_of(target, count)
        for rank in range(world):
            processes = one_of(world, rank)
            own, chunks = own_blocks(target, processes), chunk_shares(target, processes)[rank]
            assert [chunk for part in parts for chunk in chunk_shares(part, processes)[rank]] == chunks
            blocks = [number for part in parts for number in range(own.stop)[own_blocks(part, processes)]]
            assert blocks == list(range(own.start, own.stop))
            for part in parts:
                place = within(part, processes)
                assert 0 <= place.start <= place.stop <= len(blocks)
            places = [place for part in parts for place in range(len(blocks))[within(part, processes)]]
            assert places == list(range(len(blocks)))
            sizes = [len(chunk_shares(part, processes)[rank]) for part in parts]
            assert max(sizes) - min(sizes) <= 1
        assert {part.whole for part in parts} == {target}


def test_the_whole_is_no_part():
    target = Target("layer", nn.Linear(4, 4), 4)
    assert parts_of(target, 1) == [target]
    assert target.whole is target
    assert key_of(target) == "layer"
    assert len({key_of(part) for part in parts_of(target, 3)} | {"layer"}) == 4
    assert within(target, Processes()) == slice(0, 4)


@pytest.mark.parametrize("killed_at", range(9))
def test_a_join_that_was_killed_is_done_again(killed_at):
    whole, other = (Target(name, nn.Linear(4, 4), 4) for name in ("whole", "other"))
    first, second = parts_of(other, 2)
    left = killed_at

    class Dying(dict):
        """Tensors whose owner is killed as it is about to change them."""

        def change(self) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        def __setitem__(self, key, value) -> None:
            self.change()
            super().__setitem__(key, value)

        def __delitem__(self, key) -> None:
            self.change()
            super().__delitem__(key)

    orders, losses = (
        Dying(
            {"whole": torch.zeros(4) + add, key_of(first): torch.ones(2) + add, key_of(second): torch.ones(2) * 2 + add}
        )
        for add in (0, 10)
    )
    groups = [[whole, first], [second]]
    if 1 <= killed_at <= 6:
        with pytest.raises(KeyboardInterrupt):
            join(groups, orders, losses)
        # Wherever losses are, orders are: this is what a run that goes on looks at.
        assert "other" not in losses or "other" in orders
        assert "other" in losses or {key_of(first), key_of(second)} <= set(orders) & set(losses)
    join(groups, orders, losses)
    for tensors, add in ((orders, 0), (losses, 10)):
        assert {name: each.tolist() for name, each in tensors.items()} == {
            "whole": [add] * 4,
            "other": [1 + add, 1 + add, 2 + add, 2 + add],
        }
