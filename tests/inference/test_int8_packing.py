"""Packed int8 weights: what was quantised comes back, zeros stay zeros, and whole groups of four are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import make_weight
from support.int8 import make_block_weight

from cap_hf.inference.int8_packing import MOST_COLS, is_quantizable, pack_int8, quantize_rows, unpack_int8


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.one_of(st.integers(1, 40), st.sampled_from([129, 260])),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([193, 800, 1600])),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    blocks=st.booleans(),
)
def test_unpacking_gives_back_what_was_quantised(seed, rows, cols, sparsity, blocks):
    weight = (make_block_weight if blocks else make_weight)(rows, cols, sparsity, seed)
    packed = pack_int8(weight)
    quantized, scales = quantize_rows(weight)
    assert torch.equal(unpack_int8(packed), quantized)
    assert torch.equal(packed.scales, scales)
    assert torch.equal(packed.corrections, -128 * quantized.int().sum(dim=1))
    assert packed.values.shape == (int(packed.starts[-1]), 4, 4)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e30])
def test_weights_are_rounded_to_a_127th_of_the_largest_of_their_row(size):
    weight = make_weight(30, 50, 0.5) * size
    weight[3] = 0
    quantized, scales = quantize_rows(weight)
    assert int(quantized.min()) >= -127
    largest = weight.abs().amax(dim=1)
    assert torch.equal(quantized.abs().amax(dim=1)[largest > 0], torch.full((29,), 127, dtype=torch.int8))
    assert bool((quantized[weight == 0] == 0).all())
    error = (quantized.double() * scales[:, None].double() - weight.double()).abs()
    assert bool((error <= 0.501 * largest[:, None].double() / 127 + 1e-43).all()) or size == 1e-40
    assert scales[3] == 0


def test_the_layout_of_a_small_weight():
    weight = torch.zeros(5, 10)  # words of columns 0-3, 4-7 and 8-9
    weight[0, 9] = 127.0
    weight[4, [0, 5]] = torch.tensor([-1.0, 127.0])
    packed = pack_int8(weight)
    assert (packed.row_block, packed.col_block) == (8, 3)
    assert packed.order.tolist() == [[4, 0, 1, 2], [3, 5, 6, 7]]
    assert packed.starts.tolist() == [0, 2, 2]
    assert packed.values[0].tolist() == [[-1, 0, 0, 0], [0, 127, 0, 0], [0] * 4, [0] * 4]
    assert packed.offsets.tolist() == [[0, 32, 0, 0], [16, 0, 0, 0]]
    assert packed.corrections.tolist() == [-128 * 127, 0, 0, 0, -128 * 126]


def test_blocks_of_four_are_stored_without_zeros():
    weight = make_block_weight(64, 256, 0.75)
    full = int((weight != 0).sum())
    assert pack_int8(weight).values.numel() < 1.2 * full
    assert pack_int8(make_weight(64, 256, 0.75)).values.numel() > 2 * full


def test_what_cannot_be_quantised():
    assert is_quantizable(torch.zeros(2, 3))
    assert not is_quantizable(torch.tensor([[1.0, torch.nan]]))
    assert not is_quantizable(torch.tensor([[1.0, -torch.inf]]))
    assert not is_quantizable(torch.zeros(1, MOST_COLS + 1))
