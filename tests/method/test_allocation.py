"""Selections against plain sorting, and exact counts under ties."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cap_hf.method.allocation import allocate_global, allocate_uniform, path_losses, removal_turns

shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=4)


def make_paths(shapes, seed, levels):
    """Random non-decreasing paths of positive losses; few levels make many ties."""
    rng = np.random.default_rng(seed)
    values = [np.sort((rng.integers(0, levels, shape) + 1) / levels, axis=1) for shape in shapes]
    return [torch.from_numpy(value).float() for value in values]


@given(shapes=shapes, seed=st.integers(0, 2**31), levels=st.sampled_from([1, 2, 5, 10**6]), share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_global_takes_the_cheapest_and_exactly_as_many(shapes, seed, levels, share):
    paths = make_paths(shapes, seed, levels)
    total = sum(path.numel() for path in paths)
    wanted = round(total * share)
    counts = allocate_global(paths, wanted)
    assert sum(int(count.sum()) for count in counts) == wanted
    steps = [torch.arange(path.shape[1]) < count[:, None] for path, count in zip(paths, counts, strict=True)]
    taken = sorted(torch.cat([path[step] for path, step in zip(paths, steps, strict=True)]).tolist())
    cheapest = sorted(torch.cat([path.flatten() for path in paths]).tolist())[:wanted]
    assert taken == cheapest


@given(shapes=shapes, seed=st.integers(0, 2**31), sparsity=st.floats(0, 0.999))
@example(shapes=[(1, 5), (5, 5), (1, 5)], seed=0, sparsity=0.125)
@settings(max_examples=60, deadline=None)
def test_uniform_is_exact_in_total_and_even_in_each(shapes, seed, sparsity):
    paths = make_paths(shapes, seed, 4)
    sizes = [path.numel() for path in paths]
    counts = allocate_uniform(paths, sizes, sparsity)
    total = round(sum(sizes) * sparsity)
    assert sum(int(count.sum()) for count in counts) == total
    for count, size in zip(counts, sizes, strict=True):
        # To the weight of an even share of what is removed, which is a whole number of all weights.
        assert abs(int(count.sum()) - size * total / sum(sizes)) <= 1


def test_uniform_leaves_a_target_its_zeros_and_evens_out_the_others():
    paths = make_paths([(4, 10), (2, 10), (6, 10)], 0, 10**6)
    paths[0][:, :9] = 0.0
    paths[2][:, :2] = 0.0
    counts = [int(count.sum()) for count in allocate_uniform(paths, [40, 20, 60], 0.6)]
    assert counts == [36, 9, 27]


@pytest.mark.parametrize("selection", ["marginal", "cumulative"])
def test_paths_rise_and_zeros_come_first(selection):
    losses = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    path = path_losses(losses, torch.tensor([1, 2]), selection)
    expected = {"marginal": [0, 3, 3, 3], "cumulative": [0, 3, 4, 6]}[selection]
    assert path[0].tolist() == expected
    # Block 1's third removal costs nothing either, but it is a weight: every zero goes before it.
    assert path[1, :2].tolist() == [0, 0]
    assert path[1, 2] > 0
    assert allocate_global([path], 3)[0].tolist() == [1, 2]


def test_paths_survive_extreme_losses():
    losses = torch.tensor([[1e-300, 1e300]], dtype=torch.float64)
    path = path_losses(losses, torch.tensor([0]), "cumulative")
    assert path.isfinite().all()
    assert path[0, 0] < path[0, 1]


def test_a_weight_goes_in_its_unit_s_turn_or_after_all_others():
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert removal_turns(order, 4).tolist() == [[1, 2, 0, 3], [2, 0, 1, 3]]
    assert removal_turns(order, 8, 2).tolist() == [[1, 1, 2, 2, 0, 0, 3, 3], [2, 2, 0, 0, 1, 1, 3, 3]]
