"""The weights that stay against an optimality system with multipliers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratics import constrained_minimum, fisher_of

from cap_hf.method import reconstruction
from cap_hf.method.inverses import NotInvertibleError
from cap_hf.method.reconstruction import independent_update, reconstruct, reconstruct_each


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 40),
    blocks=st.integers(1, 5),
    share=st.floats(0, 1),
    kind=st.sampled_from(["random", "correlated", "identity"]),
)
@settings(max_examples=60, deadline=None)
def test_reconstruction_is_the_constrained_minimum(seed, size, blocks, share, kind):
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((blocks, size))
    fishers = np.stack([fisher_of(kind, size, rng) for _ in range(blocks)])
    keep = rng.random((blocks, size)) >= share
    new = reconstruct(torch.from_numpy(weights), torch.from_numpy(fishers), torch.from_numpy(keep)).numpy()
    assert (new[~keep] == 0).all()
    for block in range(blocks):
        expected, _ = constrained_minimum(weights[block], fishers[block], list(np.flatnonzero(~keep[block])))
        np.testing.assert_allclose(new[block], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", [True, False])
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 150),
    blocks=st.integers(0, 4),
    times=st.integers(0, 4),
    shared=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_several_times_are_the_minima_of_each_and_what_others_there_are_changes_no_bit_with_the_kernel(
    kernel, seed, size, blocks, times, shared
):
    """Solved plainly, block by block and time by time; some weights are 0 already, some blocks give up nothing else."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((blocks, size)) * (rng.random((blocks, size)) > 0.1)
    fishers = np.stack([fisher_of("correlated", size, rng) for _ in range(max(1, blocks))])
    given = torch.from_numpy(fishers[:1]).expand(blocks, -1, -1) if shared else torch.from_numpy(fishers[:blocks])
    turns = np.stack([rng.permutation(size) for _ in range(max(1, blocks))])[:blocks]
    turns[weights == 0] = -1
    counts = rng.integers(0, size + 1, (times, blocks))
    counts[:, : blocks // 3] = 0
    arguments = [torch.from_numpy(each) for each in (weights, turns, counts)]
    with pytest.MonkeyPatch.context() as patch:
        if not kernel:
            patch.setattr(reconstruction, "has_kernels", lambda tensor: False)
        found = reconstruct_each(arguments[0], given, *arguments[1:])
        assert found.shape == (times, blocks, size)
        for time in range(times):
            alone = reconstruct_each(arguments[0], given, arguments[1], arguments[2][time : time + 1])[0]
            torch.testing.assert_close(found[time], alone, rtol=0 if kernel else 1e-9, atol=0 if kernel else 1e-11)
    for time in range(times):
        for block in range(blocks):
            keep, matrix = turns[block] >= counts[time, block], given[block].numpy()
            expected = np.zeros(size)
            expected[keep] = np.linalg.solve(matrix[keep][:, keep], (matrix @ weights[block])[keep])
            np.testing.assert_allclose(found[time, block], expected, rtol=1e-6, atol=1e-8)
            assert (found[time, block][~torch.from_numpy(keep)] == 0).all()
            if not weights[block][~keep].any():
                assert (found[time, block].numpy() == weights[block]).all()


def test_independent_update_sums_the_single_steps():
    rng = np.random.default_rng(0)
    weights, fisher = rng.standard_normal(5), fisher_of("random", 5, rng)
    inverse = np.linalg.inv(fisher)
    expected = weights.copy()
    for entry in (1, 3):
        expected = expected - weights[entry] / inverse[entry, entry] * inverse[:, entry]
    expected[[1, 3]] = 0.0
    keep = torch.tensor([[True, False, True, False, True]])
    found = independent_update(torch.from_numpy(weights)[None], torch.from_numpy(inverse)[None], keep)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_survivors_that_cannot_be_solved_for_name_their_block():
    fisher = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    fisher[1, 0, 0] = -1
    weights, keep = torch.ones(3, 4, dtype=torch.float64), torch.tensor([True, True, False, True]).expand(3, 4)
    with pytest.raises(NotInvertibleError) as caught:
        reconstruct(weights, fisher, keep)
    assert caught.value.block == 1
    damped = fisher + caught.value.damp * torch.eye(4, dtype=torch.float64)
    assert reconstruct(weights, damped, keep).isfinite().all()
