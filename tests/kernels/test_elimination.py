"""The elimination kernel: it removes what the PyTorch code removes, bit for bit on any number of threads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import make_blocks, same_removals

from cap_hf.config import NMPattern
from cap_hf.kernels.build import load_extension
from cap_hf.method import elimination, panels, reconstruction


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert load_extension("elimination"), "no C++ compiler: the kernels cannot be tested"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 9),
    size=st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 192, 193])),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_kernel_removes_what_pytorch_removes(seed, n, size, zeros):
    weights, fisher = make_blocks(seed, n, size, zeros)
    inverse = elimination.invert(fisher)
    same_removals(elimination.eliminate(weights, inverse), panels.eliminate_in_torch(weights, inverse))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 9),
    size=st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 192, 193])),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_kernel_in_float32_removes_what_it_removes_in_float64(seed, n, size, zeros):
    """But for weights that cost nearly the same, of which either may go first."""
    weights, fisher = make_blocks(seed, n, size, zeros)
    inverse = elimination.invert(fisher)
    exact, found = (elimination.eliminate(weights.to(t), inverse.to(t)) for t in (torch.float64, torch.float32))
    assert found.losses.dtype == torch.float32
    assert torch.equal(found.order.sort(dim=1).values, exact.order.sort(dim=1).values)
    torch.testing.assert_close(found.losses.double().sum(1), exact.losses.sum(1), rtol=1e-2, atol=1e-6)
    in_torch = panels.eliminate_in_torch(weights.float(), inverse.float())
    torch.testing.assert_close(found.losses.sum(1), in_torch.losses.sum(1), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("kept", "of", "size"), [(2, 4, 64), (1, 4, 132), (4, 8, 96), (1, 2, 2)])
def test_kernel_keeps_a_pattern(kept, of, size):
    weights, fisher = make_blocks(3, 5, size, zeros=0.2)
    inverse, pattern = elimination.invert(fisher), NMPattern(kept, of)
    found = elimination.eliminate(weights, inverse, pattern)
    same_removals(found, panels.eliminate_in_torch(weights, inverse, pattern))
    removed = torch.zeros(5, size).scatter(1, found.order, 1.0)
    assert (removed.view(5, -1, of).sum(dim=2) == of - kept).all()


def test_kernel_names_the_first_block_with_a_lost_pivot():
    weights, fisher = make_blocks(1, 6, 40)
    inverse = elimination.invert(fisher)
    inverse[4] = -inverse[4]
    inverse[2, 7, 7] = math.nan
    for solve in (elimination.eliminate, panels.eliminate_in_torch):
        with pytest.raises(panels.LostPivotError) as caught:
            solve(weights, inverse)
        assert caught.value.block == 2


def test_blocks_may_share_one_inverse():
    weights, fisher = make_blocks(2, 3, 30)
    shared = elimination.invert(fisher[:1]).expand(3, -1, -1)
    same_removals(elimination.eliminate(weights, shared), panels.eliminate_in_torch(weights, shared))


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_reconstruction_equals_pytorch(share, monkeypatch):
    weights, fisher = make_blocks(8, 6, 90)
    keep = torch.rand(6, 90, generator=torch.Generator().manual_seed(1)) < share
    found = reconstruction.reconstruct(weights, fisher, keep)
    monkeypatch.setattr(reconstruction, "has_kernels", lambda *_: False)
    torch.testing.assert_close(found, reconstruction.reconstruct(weights, fisher, keep), rtol=1e-9, atol=1e-12)
    assert (found[~keep] == 0).all()


def test_kernels_run_in_inference_mode():
    weights, fisher = make_blocks(6, 8, 40)
    keep = weights > 0
    expected = elimination.invert(fisher), reconstruction.reconstruct(weights, fisher, keep)
    with torch.inference_mode():
        fisher = fisher.clone()
        torch.testing.assert_close(elimination.invert(fisher), expected[0])
        torch.testing.assert_close(reconstruction.reconstruct(weights, fisher, keep), expected[1])


def test_one_thread_and_two_give_the_same_bits():
    weights, fisher = make_blocks(4, 20, 100)
    inverse, threads = elimination.invert(fisher), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(elimination.eliminate(weights, inverse))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].losses, results[1].losses)
    assert torch.equal(results[0].order, results[1].order)
