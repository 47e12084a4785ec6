"""Packed weights: what was packed comes back, and the layout is the one that sparse_linear.h describes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import make_weight

from cap_hf.inference.packing import SLICE, even_blocks, pack, unpack


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 260])),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([191, 192, 193, 400, 800])),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
)
def test_unpacking_gives_back_what_was_packed(seed, rows, cols, sparsity):
    weight = make_weight(rows, cols, sparsity, seed)
    packed = pack(weight)
    assert torch.equal(unpack(packed), weight)
    assert len(packed.values) == packed.starts[-1]
    stored = int((packed.values != 0).sum())
    assert stored == int((weight != 0).sum())


def test_the_layout_of_a_small_weight():
    weight = torch.zeros(5, 300)  # two column blocks of 150; rows in slices of four
    weight[0, [0, 7]] = torch.tensor([1.0, 2.0])
    weight[2, 3] = 3.0
    weight[4, [1, 2, 149]] = torch.tensor([4.0, 5.0, 6.0])
    weight[1, 151] = 7.0
    packed = pack(weight)
    assert (packed.row_block, packed.col_block) == (8, 300)  # almost empty: one wide block
    assert packed.starts.tolist() == [0, 3, 3]
    assert packed.order.tolist() == [[4, 0, 1, 2], [3, 5, 6, 7]]  # the longest rows come first
    assert packed.values.tolist() == [[4.0, 1.0, 7.0, 3.0], [5.0, 2.0, 0.0, 0.0], [6.0, 0.0, 0.0, 0.0]]
    assert packed.offsets.tolist() == [[16, 0, 151 * 16, 48], [32, 112, 0, 0], [149 * 16, 0, 0, 0]]


def test_dense_rows_are_cut_into_more_column_blocks_than_sparse_ones():
    dense, sparse = make_weight(64, 768, 0.5), make_weight(64, 768, 0.9)
    assert pack(dense).col_block == 192
    assert pack(sparse).col_block == 384


def test_blocks_are_even():
    assert even_blocks(130, 128, 16) == 80  # two of 80, rather than 128 and 2
    assert even_blocks(128, 128, 16) == 128
    assert even_blocks(3, 128, SLICE) == 4
