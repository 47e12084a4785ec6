"""What goes into which pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cap_hf.collection.shares import block_shares
from cap_hf.collection.splitting import in_parts, split_passes, sums_bytes
from cap_hf.distributed.processes import Processes
from cap_hf.targets import Target


def processes(world: int) -> Processes:
    """So many processes, which no backend connects."""
    made = Processes()
    made.world = world
    return made


def layer(rows: int, size: int, index: int = 0) -> Target:
    """A Linear, pruned in whole rows."""
    return Target(f"layer-{index}", nn.Linear(size, rows, bias=False), size, index)


def most_bytes(part: Target, world: int, prior: bool) -> int:
    """Bytes of a part's sums, in the process that has most of them."""
    blocks = max(share.stop - share.start for share in block_shares(part, processes(world)))
    return sums_bytes(part, blocks, prior)


@given(
    rows=st.integers(1, 500),
    size=st.sampled_from([16, 64]),
    share=st.floats(0, 0.99),
    world=st.integers(1, 3),
    prior=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_as_few_as_fit(rows, size, share, world, prior):
    target = layer(rows, size)
    room = int(share * most_bytes(target, world, prior))
    found = in_parts(target, room, processes(world), prior)
    sizes = [bytes_ for _, bytes_ in found]
    assert all(bytes_ <= room and bytes_ == most_bytes(part, world, prior) for part, bytes_ in found)
    # With fewer of them one would be too large.
    for count in range(2, len(found) if found else 17):
        parts = [Target(target.name, target.module, size, 0, (), (number, count)) for number in range(count)]
        assert max(most_bytes(part, world, prior) for part in parts) > room
    assert [part.part for part, _ in found] == [(number, len(sizes)) for number in range(len(sizes))]


@pytest.mark.parametrize("room", [10, 12, 25, 10**9])
def test_passes_are_full_and_have_a_target_once(room):
    first, second, third = (layer(64, 16, index) for index in range(3))
    halves = [Target(second.name, second.module, 16, 1, (), (number, 2)) for number in range(2)]
    pieces = [(first, 2), (halves[0], 10), (halves[1], 10), (third, 2)]
    passes = split_passes(pieces, room)
    assert [piece for each in passes for piece in each] == pieces
    assert all(sum(size for _, size in each) <= room for each in passes)
    assert all(len({target.name for target, _ in each}) == len(each) for each in passes)
    assert len(passes) == {10: 4, 12: 2}.get(room, 2)
