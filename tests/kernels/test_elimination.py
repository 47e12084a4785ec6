"""The elimination kernel: it removes what the PyTorch code removes, bit for bit on any number of threads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import make_blocks, same_removals
from support.quadratics import inverse_of

from cap_hf.kernels.build import load_extension
from cap_hf.method import elimination, inverses, panels, reconstruction
from cap_hf.patterns import NMPattern

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([96, 127, 192, 193]))


@pytest.fixture(scope="module", autouse=True)
def kernels():
    assert load_extension("elimination"), "no C++ compiler: the kernels cannot be tested"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 9),
    size=SIZES,
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_kernel_removes_what_pytorch_removes(seed, n, size, zeros):
    weights, fisher = make_blocks(seed, n, size, zeros)
    inverse = inverses.invert(fisher)
    same_removals(elimination.eliminate(weights, inverse), panels.eliminate_in_torch(weights, inverse))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 9),
    size=SIZES,
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_kernel_in_float32_removes_what_it_removes_in_float64(seed, n, size, zeros):
    """But for weights that cost nearly the same, of which either may go first."""
    weights, fisher = make_blocks(seed, n, size, zeros)
    inverse = inverses.invert(fisher)
    exact, found = (elimination.eliminate(weights.to(t), inverse.to(t)) for t in (torch.float64, torch.float32))
    assert found.losses.dtype == torch.float32
    assert torch.equal(found.order.sort(dim=1).values, exact.order.sort(dim=1).values)
    torch.testing.assert_close(found.losses.double().sum(1), exact.losses.sum(1), rtol=1e-2, atol=1e-6)
    in_torch = panels.eliminate_in_torch(weights.float(), inverse.float())
    torch.testing.assert_close(found.losses.sum(1), in_torch.losses.sum(1), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("kept", "of", "size"), [(2, 4, 64), (1, 4, 132), (4, 8, 96), (1, 2, 2)])
def test_kernel_keeps_a_pattern(kept, of, size):
    weights, fisher = make_blocks(3, 5, size, zeros=0.2)
    inverse, pattern = inverses.invert(fisher), NMPattern(kept, of)
    found = elimination.eliminate(weights, inverse, pattern)
    same_removals(found, panels.eliminate_in_torch(weights, inverse, pattern))
    removed = torch.zeros(5, size).scatter(1, found.order, 1.0)
    assert (removed.view(5, -1, of).sum(dim=2) == of - kept).all()


def test_kernel_names_the_first_block_with_a_lost_pivot():
    weights, fisher = make_blocks(1, 6, 40)
    inverse = inverses.invert(fisher)
    inverse[4] = -inverse[4]
    inverse[2, 7, 7] = math.nan
    for solve in (elimination.eliminate, panels.eliminate_in_torch):
        with pytest.raises(panels.LostPivotError) as caught:
            solve(weights, inverse)
        assert caught.value.block == 2


def test_blocks_may_share_one_inverse():
    weights, fisher = make_blocks(2, 3, 30)
    shared = inverses.invert(fisher[:1]).expand(3, -1, -1)
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
    expected = inverses.invert(fisher), reconstruction.reconstruct(weights, fisher, keep)
    with torch.inference_mode():
        fisher = fisher.clone()
        torch.testing.assert_close(inverses.invert(fisher), expected[0])
        torch.testing.assert_close(reconstruction.reconstruct(weights, fisher, keep), expected[1])


def test_one_thread_and_two_give_the_same_bits():
    weights, fisher = make_blocks(4, 20, 100)
    inverse, threads = inverses.invert(fisher), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(elimination.eliminate(weights, inverse))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].losses, results[1].losses)
    assert torch.equal(results[0].order, results[1].order)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 5), size=SIZES, power=st.integers(-40, 40))
def test_quick_inverses_are_as_good_as_those_of_float32_can_be(seed, n, size, power):
    """Against float64, and against what the PyTorch code says of its own inverse's error."""
    _, fisher = make_blocks(seed, n, size)
    scale = torch.full((n, 1), 2.0**power, dtype=torch.float64)
    inverse, error = torch.ops.cap_hf.invert_quickly(fisher * 2.0**power, 1 / scale[:, 0])
    assert inverse.dtype == torch.float32
    assert torch.equal(inverse, inverse.mT)
    exact = inverse_of(fisher)
    condition = torch.linalg.cond(fisher)
    distance = (inverse.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert (distance <= 1e-6 * condition).all()
    signs = torch.ones(size, dtype=torch.float64)
    signs[::2] = -1
    expected = (fisher @ (inverse.double() @ signs)[..., None])[..., 0] - signs
    torch.testing.assert_close(error, expected.abs().amax(dim=1) / size**0.5, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("size", [5, 70, 130])
@pytest.mark.parametrize("wrong", [-1.0, 0.0, float("nan"), float("inf")])
def test_what_cannot_be_inverted_is_infinitely_wrong_and_harms_no_other(size, wrong):
    _, fisher = make_blocks(0, 3, size)
    fisher[1, -2, -2] = wrong
    ones = torch.ones(3, dtype=torch.float64)
    inverse, error = torch.ops.cap_hf.invert_quickly(fisher, ones)
    assert error[1] == torch.inf
    assert (error[[0, 2]] < 1e-4).all()
    assert inverse.isfinite().all()


def test_quick_inverses_do_not_depend_on_threads_or_on_other_blocks():
    _, fisher = make_blocks(2, 7, 130)
    ones = torch.ones(7, dtype=torch.float64)
    expected, error = torch.ops.cap_hf.invert_quickly(fisher, ones)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(torch.ops.cap_hf.invert_quickly(fisher, ones)[0], expected)
    finally:
        torch.set_num_threads(before)
    found = torch.ops.cap_hf.invert_quickly(fisher[4:5], ones[:1])
    assert torch.equal(found[0], expected[4:5])
    assert torch.equal(found[1], error[4:5])
