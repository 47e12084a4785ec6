"""Memory that is asked for."""

import platform

import psutil
import pytest
import torch

from cap_hf.memory import HUGE_PAGE, Arena, release, zeros


@pytest.mark.parametrize("numel", [0, 1, HUGE_PAGE // 4, HUGE_PAGE // 2 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64])
def test_zeros_are_zeros_of_their_own(numel, dtype):
    first, second = (zeros((1, numel), dtype, torch.device("cpu")) for _ in range(2))
    assert first.shape == (1, numel)
    assert first.dtype == dtype
    assert not first.any()
    first += 1
    assert first.all()
    assert not second.any()
    del first
    assert not zeros((numel,), dtype, torch.device("cpu")).any()


@pytest.mark.skipif(not platform.libc_ver()[0], reason="the C library is not glibc")
def test_memory_between_what_stays_goes_back_to_the_system():
    process = psutil.Process()
    tensors = [torch.ones(25_000) for _ in range(800)]
    before = process.memory_info().rss
    del tensors[::2]
    release()
    assert before - process.memory_info().rss > 25_000_000
    assert all(bool((each == 1).all()) for each in tensors)


CPU = torch.device("cpu")


def test_an_arena_gives_zeros_in_the_same_memory_again():
    arena = Arena(2**12)
    first = arena.zeros((3, 5), torch.float32, CPU).fill_(7)
    second = arena.zeros((2, 4), torch.float64, CPU).fill_(8)
    assert first.unique().item() == 7
    assert second.data_ptr() % 64 == 0
    place = first.data_ptr()
    arena.reuse()
    again = arena.zeros((4, 5), torch.float32, CPU)
    assert again.data_ptr() == place
    assert again.shape == (4, 5)
    assert not again.any()
    # What is new and what was there before do not overlap.
    beside = arena.zeros((100,), torch.int8, CPU)
    again.fill_(9)
    assert not beside.any()


def test_what_an_arena_has_no_room_for_is_fresh():
    arena = Arena(64)
    inside, outside = (arena.zeros((16,), torch.float32, CPU) for _ in range(2))
    inside.fill_(1)
    assert not outside.any()
    assert Arena(0).zeros((3,), torch.float32, CPU).sum() == 0
    assert arena.zeros((0, 4), torch.float32, CPU).shape == (0, 4)


def test_a_cleared_arena_leaves_what_is_still_held_alone():
    arena = Arena(2**12)
    held = arena.zeros((8,), torch.float32, CPU).fill_(3)
    arena.clear()
    other = arena.zeros((8,), torch.float32, CPU).fill_(4)
    assert held.unique().item() == 3
    assert other.unique().item() == 4
