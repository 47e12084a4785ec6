"""Who owns which blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import ARCHITECTURES, build
from torch import nn

from cap_hf.collection.shares import block_shares, chunk_weights, largest_shares, own_blocks, row_chunks
from cap_hf.distributed.processes import Processes
from cap_hf.targets import Target, find_targets

CPU = torch.device("cpu")


def processes(world: int, rank: int = 0) -> Processes:
    """One of several processes, which no backend connects."""
    made = Processes()
    made.world, made.rank = world, rank
    return made


@given(rows=st.integers(1, 400), row=st.sampled_from([8, 64, 768]), blocks_per=st.sampled_from([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_chunks_are_whole_blocks_and_all_of_the_rows(rows, row, blocks_per):
    size = row * (blocks_per if rows % blocks_per == 0 else 1)
    target = Target("layer", nn.Linear(row, rows, bias=False), size)
    chunks = row_chunks(target, CPU)
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == rows
    assert all(chunk.start * row % size == 0 for chunk in chunks)
    assert chunk_weights(target, CPU) == max(chunk.stop - chunk.start for chunk in chunks) * row


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_block_has_one_owner(name, world):
    for target in find_targets(build(name), 24):
        shares = block_shares(target, processes(world))
        assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
        assert shares[-1].stop == target.num_blocks
        assert [own_blocks(target, processes(world, rank)) for rank in range(world)] == shares


def test_the_larger_share_goes_round():
    """One process had the larger share of every target, and the others waited for it."""
    targets = [Target(f"layer {index}", nn.Linear(8, 40, bias=False), 8, index) for index in range(4)]
    owned = [
        sum(share.stop - share.start for share in (block_shares(target, processes(3))[rank] for target in targets[:3]))
        for rank in range(3)
    ]
    assert max(owned) - min(owned) <= max(chunk_weights(target, CPU) // 8 for target in targets)
    first = {tuple(share.stop - share.start for share in block_shares(target, processes(3))) for target in targets}
    assert len(first) > 1
    blocks = largest_shares(targets, processes(3))
    assert len(blocks) == 4
    assert sum(blocks) >= 160 / 3


def test_chunks_are_larger_where_launches_cost():
    linear = nn.Linear(4096, 4096, bias=False, device="meta")
    on_device = row_chunks(Target("layer", linear, 4096), linear.weight.device)
    on_cpu = row_chunks(Target("layer", nn.Linear(4096, 4096, bias=False), 4096), CPU)
    assert len(on_device) < len(on_cpu)
    assert torch.device("meta") == linear.weight.device
