"""The Triton kernel of the elimination's steps, in Triton's interpreter: it removes what the PyTorch code removes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.blocks import make_blocks, same_removals

from cap_hf.method import panels
from cap_hf.method.inverses import invert
from cap_hf.patterns import NMPattern

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def remove():
    """The kernel, on a GPU or, where there is none, by an interpreter (see conftest.py)."""
    pytest.importorskip("triton", reason="Triton is not installed: the kernel of GPUs is not tested")
    return panels.load_fused()


def both(remove, weights, inverse, pattern=None):
    found = panels.eliminate_in_torch(weights.to(DEVICE), inverse.to(DEVICE), pattern, remove)
    expected = panels.eliminate_in_torch(weights, inverse, pattern, panels.remove_in_torch)
    return panels.Elimination(found.order.cpu(), found.losses.cpu()), expected


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 3),
    size=st.one_of(st.integers(1, 40), st.sampled_from([64, 65])),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_it_removes_what_pytorch_removes(remove, seed, n, size, zeros):
    weights, fisher = make_blocks(seed, n, size, zeros)
    same_removals(*both(remove, weights, invert(fisher)))


@pytest.mark.parametrize(("size", "pattern"), [(8, NMPattern(2, 4)), (80, NMPattern(1, 8)), (72, NMPattern(1, 4))])
def test_no_group_gives_up_more_than_its_pattern_allows(remove, size, pattern):
    weights, fisher = make_blocks(3, 2, size, zeros=0.1)
    found, expected = both(remove, weights, invert(fisher), pattern)
    same_removals(found, expected)
    groups = torch.stack([torch.bincount(each // pattern.m, minlength=size // pattern.m) for each in found.order])
    assert (groups == pattern.m - pattern.n).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_panels(remove, dtype, monkeypatch):
    if DEVICE.type == "cpu":  # the interpreter takes seconds for each step of a panel of large blocks
        monkeypatch.setattr(panels, "CHECKED", panels.CHECKED[:2])
    panels.check_fused(remove, DEVICE, dtype)


def as_on_a_gpu(indices):
    """What finds a minimum in pairs, as Triton does it on a GPU, where no comparison with what is no number holds."""

    def argmin(values, axis=None, keepdims=False):
        values, places = np.asarray(values).reshape(-1), np.arange(np.size(values))
        while len(values) > 1:
            (left, right), (first, second) = (each.reshape(2, -1) for each in (values, places))
            less = (left < right) | ((left == right) & (first < second))
            values, places = np.where(less, left, right), np.where(less, first, second)
        indices.append(int(places[0]))
        return places[0]

    return argmin


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it is about what the interpreter does otherwise than a GPU")
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("size", [17, 65])
def test_after_a_lost_pivot_nothing_beyond_a_block_is_taken(remove, size, monkeypatch):
    """A GPU's minimum passes over what is no number, and the places beyond a block's end are no weights."""
    from triton.runtime import interpreter

    reduce, indices = interpreter.ReduceOps.min_max, []

    def min_max(self, values, val_reduce_op, idx_reduce_op=None):
        return reduce(self, values, val_reduce_op, as_on_a_gpu(indices))

    monkeypatch.setattr(interpreter.ReduceOps, "min_max", min_max)
    weights, fisher = make_blocks(1, 1, size)
    inverse = invert(fisher)
    for wrong in (0, size // 2, size - 1):
        broken = inverse.clone()
        broken[0, wrong, wrong] = -1.0
        with pytest.raises(panels.LostPivotError):
            panels.eliminate_in_torch(weights, broken, None, remove)
    assert max(indices) < size
    same_removals(*both(remove, weights, inverse))


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # of NumPy, about the root of what is negative
def test_it_loses_the_pivots_that_pytorch_loses(remove):
    weights, fisher = make_blocks(1, 3, 20)
    inverse = invert(fisher)
    inverse[1, 4, 4] = -1.0
    for each in (remove, panels.remove_in_torch):
        with pytest.raises(panels.LostPivotError) as caught:
            panels.eliminate_in_torch(weights.to(DEVICE), inverse.to(DEVICE), None, each)
        assert caught.value.lost.tolist() == [False, True, False]
