"""int8 weights packed and unpacked: what NumPy makes of the definition, sizes, and parts that contradict each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import make_weight
from support.int8 import make_block_weight

from cap_hf import CAPError
from cap_hf.checkpoints.compression import BITMASK, CODES, SCALES, SHAPE, VALUES, pack
from cap_hf.checkpoints.int8 import (
    MOST_COLS,
    check_int8_parts,
    dequantize_rows,
    is_for_int8,
    pack_int8,
    quantize_rows,
    unpack_any,
    unpack_int8,
)
from cap_hf.checkpoints.weights import count_bytes


def prune_blocks(rows, cols, size, share, seed=0):
    """Exactly this share of the blocks of each weight is zero, as pruning in blocks of 1xsize leaves it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    blocks = rows * -(-cols // size)
    kept = torch.ones(blocks, dtype=torch.bool)
    kept[torch.randperm(blocks, generator=generator)[: round(share * blocks)]] = False
    mask = kept.view(rows, -1).repeat_interleave(size, dim=1)[:, :cols]
    return weight * mask + 0.0


def read_plainly(parts):
    """The int8 weight and its scales, number by number, from parts with a bitmask."""
    rows, cols = parts[SHAPE].shape[1:]
    values = parts[VALUES].numpy()
    size = values.dtype.itemsize
    numbers = values.view(np.int8).reshape(-1, size)
    bits = np.unpackbits(parts[BITMASK].numpy(), bitorder="little")
    weight = np.zeros((rows, -(-cols // size) * size), dtype=np.int8)
    taken = 0
    for block in range(rows * -(-cols // size)):
        if bits[block]:
            row, place = divmod(block * size, weight.shape[1])
            weight[row, place : place + size] = numbers[taken]
            taken += 1
    assert taken == len(numbers)
    return weight[:, :cols], np.frombuffer(parts[SCALES].numpy().tobytes(), dtype=np.float32)


def round_plainly(weight):
    """int8 and scales by the definition, in NumPy's longest floats."""
    weight = weight.numpy().astype(np.longdouble)
    largest = np.abs(weight).max(axis=1)
    quotient = weight * np.longdouble(127) / np.where(largest > 0, largest, 1)[:, None]
    return np.rint(quotient).astype(np.int8), (largest.astype(np.float64) / 127).astype(np.float32)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 20),
    cols=st.integers(1, 70),
    size=st.sampled_from([1, 2, 4, 8]),
    sparsity=st.sampled_from([0.3, 0.75, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_what_is_stored_is_the_rounded_weight(seed, rows, cols, size, sparsity, dtype):
    weight = prune_blocks(rows, cols, size, sparsity, seed).to(dtype)
    parts = pack_int8(weight, "x")
    if parts is None:
        return
    check_int8_parts(parts, "x")
    expected, of_rows = round_plainly(weight.float())
    quantized, scales = unpack_int8(parts)
    assert np.array_equal(quantized.numpy(), expected)
    assert np.array_equal(scales.numpy(), of_rows)
    if BITMASK in parts:
        stored, stored_scales = read_plainly(parts)
        assert np.array_equal(stored, expected)
        assert np.array_equal(stored_scales, of_rows)
    dense = unpack_any(parts)
    assert dense.dtype == dtype
    assert torch.equal(dense, torch.from_numpy(expected.astype(np.float32) * of_rows[:, None]).to(dtype))
    assert bool((dense[weight == 0] == 0).all())
    # Rounded once more, it stays what it is: in half precision too, whose own rounding is smaller than a step.
    again, again_scales = quantize_rows(dense.float())
    assert torch.equal(again, quantized)
    torch.testing.assert_close(again_scales, scales, rtol=2e-7 if dtype.itemsize > 2 else 4e-3, atol=0)


@pytest.mark.parametrize(("size", "most"), [(1, 0.0950), (2, 0.0792), (4, 0.0714), (8, 0.0675)])
def test_three_quarters_of_zeros_take_these_bytes_of_float32(size, most):
    weight = prune_blocks(384, 1536, size, 0.75)
    parts = pack_int8(weight, "x")
    assert parts[VALUES].element_size() == size
    assert count_bytes(parts) <= most * weight.numel() * 4


def test_blocks_of_four_in_three_quarters_take_less_than_eight_hundredths_of_float32():
    for rows, cols in ((192, 192), (384, 384), (384, 1536), (1536, 384), (768, 3072)):
        weight = prune_blocks(rows, cols, 4, 0.75)
        assert count_bytes(pack_int8(weight, "x")) <= 0.08 * weight.numel() * 4


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_size_of_the_blocks_is_the_one_that_takes_the_fewest_bytes(size):
    weight = prune_blocks(64, 100, size, 0.8)
    quantized, _ = quantize_rows(weight)
    bytes_of = {}
    for each in (1, 2, 4, 8):
        padded = np.pad(quantized.numpy(), ((0, 0), (0, -100 % each))).reshape(-1, each)
        bytes_of[each] = each * int(padded.any(axis=1).sum()) + -(-len(padded) // 8)
    parts = pack_int8(weight, "x")
    assert parts[VALUES].numel() * parts[VALUES].element_size() + parts[BITMASK].numel() == min(bytes_of.values())
    assert bytes_of[parts[VALUES].element_size()] == min(bytes_of.values())


def test_nm_patterns_have_codes_here_too():
    weight = torch.randn(32, 64)
    weight.view(-1, 4)[:, [0, 3]] = 0
    parts = pack_int8(weight, "x")
    assert CODES in parts
    assert torch.equal(unpack_any(parts), dequantize_rows(*quantize_rows(weight)))


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1.0, 3e38, torch.finfo(torch.float32).max])
def test_rows_of_any_size_and_of_zeros(size):
    weight = (make_block_weight(12, 30, 0.5).clamp(-1, 1) * size).contiguous()
    weight[3] = 0
    dense = unpack_any(pack_int8(weight, "x"))
    assert bool((dense[3] == 0).all())
    error = (dense.double() - weight.double()).abs()
    assert bool((error <= 0.51 * weight.double().abs().amax(dim=1, keepdim=True) / 127 + 127 * 1.5e-45).all())


def test_halves_become_the_even_number():
    """In half precision they are common: half of the largest is 63.5 of 127."""
    largest = torch.linspace(0.5, 1.5, 500).bfloat16().float()[:, None]
    quantized, _ = quantize_rows(largest * torch.tensor([1.0, 0.5, -0.5, 0.0]))
    assert torch.equal(quantized, torch.tensor([127, 64, -64, 0], dtype=torch.int8).expand(500, 4))


def test_which_weights_become_int8():
    for sparsity, wanted in ((0.0, False), (0.009, False), (0.01, True), (1.0, True)):
        weight = torch.ones(10, 100)
        weight.view(-1)[: int(sparsity * 1000)] = 0
        assert is_for_int8(weight) is wanted
    sparse = make_weight(6, 8, 0.9)
    for other in (sparse.view(6, 2, 2, 2), sparse.int(), sparse.view(-1), sparse[:0], torch.zeros(1, MOST_COLS + 1)):
        assert not is_for_int8(other)
    assert is_for_int8(torch.zeros(1, MOST_COLS))


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1.0, 0.0, torch.nan]]),
        torch.tensor([[0.0, torch.inf]], dtype=torch.float16),
        torch.tensor([[0.0, 1e39]], dtype=torch.float64),
    ],
)
def test_what_is_not_finite_is_named(weight):
    with pytest.raises(CAPError, match=r"^a\.b\.weight has entries that are NaN or infinite"):
        pack_int8(weight, "a.b.weight")


def test_on_the_meta_device_there_are_shapes_and_dtypes():
    parts = {name: part.to("meta") for name, part in pack_int8(make_block_weight(8, 30, 0.5).half(), "x").items()}
    dense = unpack_any(parts)
    assert dense.is_meta
    assert (dense.shape, dense.dtype) == ((8, 30), torch.float16)


def test_a_cast_of_the_shape_is_the_dtype_of_what_comes_out():
    weight = make_block_weight(8, 30, 0.5)
    parts = pack_int8(weight, "x")
    cast = unpack_any(parts | {SHAPE: parts[SHAPE].bfloat16()})
    assert torch.equal(cast, dequantize_rows(*quantize_rows(weight)).bfloat16())


def test_other_tensors_are_unpacked_as_ever():
    weight = make_block_weight(8, 30, 0.5)
    assert torch.equal(unpack_any(pack(weight)), weight)


def scale(value):
    return lambda p: p[SCALES].view(torch.float32)[2:3].fill_(value)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (scale(torch.nan), "a scale that is NaN, negative or too large"),
        (scale(torch.inf), "a scale that is NaN, negative or too large"),
        (scale(3e36), "a scale that is NaN, negative or too large"),
        (scale(-1.0), "a scale that is NaN, negative or too large"),
        (lambda p: p.update({SCALES: p[SCALES][:-1]}), "not one scale per row"),
        (lambda p: p.update({SCALES: p[SCALES].view(torch.float32)}), "not one scale per row"),
        (lambda p: p.update({SCALES: p[SCALES][:, None]}), "not one scale per row"),
        (lambda p: p.update({VALUES: p[VALUES][1:]}), "values, its bitmask marks"),
        (lambda p: p.update({VALUES: p[VALUES].view(torch.float32)}), "are no blocks of them"),
        (lambda p: p.update({VALUES: p[VALUES].view(torch.int16)}), "bitmask or values of a wrong shape"),
        (lambda p: p[VALUES].view(torch.int8)[5:6].fill_(-128), "has -128 among its int8 numbers"),
        (lambda p: p[BITMASK][:1].bitwise_xor_(1), "values, its bitmask marks"),
        (lambda p: p.update({BITMASK: p[BITMASK][1:]}), "bitmask or values of a wrong shape"),
        (lambda p: p.update({SHAPE: p[SHAPE].to(torch.uint8)}), "of no weight of a Linear"),
        (lambda p: p.update({SHAPE: torch.empty(0, 16)}), "of no weight of a Linear"),
        (lambda p: p.update({SHAPE: torch.empty(0, 16, 2, 16)}), "of no weight of a Linear"),
        (lambda p: p.update({SHAPE: torch.empty(1, 16, 32)}), "of no weight of a Linear"),
        (lambda p: p.update({SHAPE: torch.empty(0, 1, MOST_COLS + 1)}), "of no weight of a Linear"),
        (lambda p: p.update({SHAPE: torch.empty(0, 0, 32)}), "of a tensor with entries"),
        (lambda p: p.update({SHAPE: torch.empty(0, 17, 32)}), "bitmask or values of a wrong shape"),
        (lambda p: p.pop(SHAPE), "has the parts"),
        (lambda p: p.pop(VALUES), "has the parts"),
        (lambda p: p.pop(BITMASK), "has the parts"),
        (lambda p: p.update({CODES: p[BITMASK]}), "has the parts"),
    ],
)
def test_parts_that_contradict_each_other(damage, line):
    parts = {name: part.clone() for name, part in pack_int8(prune_blocks(16, 32, 4, 0.75), "x").items()}
    assert parts[VALUES].dtype == torch.int32
    damage(parts)
    for read in (lambda: check_int8_parts(parts, "x"), lambda: unpack_any(parts)):
        with pytest.raises(CAPError, match=line) as error:
            read()
        assert "\n" not in str(error.value)
        assert str(error.value).endswith("the file is damaged")


def test_all_but_one_part_of_it_is_no_weight():
    with pytest.raises(CAPError, match="has the parts none: the file is damaged"):
        check_int8_parts({SCALES: torch.zeros(3, dtype=torch.int32)}, "x")
