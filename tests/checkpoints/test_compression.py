"""Packing and unpacking: round trips bit for bit, sizes."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.packing import DTYPES, bits, prune_nm, random_bits, unstructured

from cap_hf.checkpoints import compression
from cap_hf.checkpoints.compression import BITMASK, CHUNK, CODES, SHAPE, VALUES, pack, unpack

# Bits of a code: 16, 16, 36, 16, 8, 28, 70 and 8 bytes have N ones in each group of M bits.
CODE_BITS = {(1, 2): 4, (1, 4): 4, (2, 4): 6, (3, 4): 4, (1, 8): 3, (2, 8): 5, (4, 8): 7, (7, 8): 3}
PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (7, 8)]


def assert_round_trip(tensor):
    parts = pack(tensor)
    if parts is None:
        return None
    assert num_bytes(parts) < tensor.numel() * tensor.element_size()
    restored = unpack(parts)
    assert restored.dtype == tensor.dtype
    assert restored.shape == tensor.shape
    assert restored.is_contiguous()
    assert torch.equal(bits(restored), bits(tensor))
    return parts


def num_bytes(parts):
    return sum(part.numel() * part.element_size() for part in parts.values())


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from(DTYPES),
    st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_tensor(shape, dtype, sparsity, seed):
    tensor = random_bits(shape, dtype, seed)
    drop = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < sparsity
    bits(tensor)[drop.view(-1)] = 0
    assert_round_trip(tensor)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.sampled_from([(8,), (3, 8), (5, 16), (2, 8, 3, 3), (4, 16, 1, 1), (7, 2, 8), (65, 24)]),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_round_trip_of_patterns_with_more_zeros_than_they_need(pattern, shape, extra, seed):
    tensor = prune_nm(shape, *pattern, seed=seed)
    tensor[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < extra] = 0
    assert_round_trip(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_special_values_survive(dtype):
    tensor = torch.zeros(64, 64, dtype=dtype)
    tensor[0, :6] = torch.tensor([-0.0, float("inf"), -float("inf"), float("nan"), 5e-324, 1.0], dtype=dtype)
    bits(tensor)[100] = -1  # a NaN with every payload bit
    parts = assert_round_trip(tensor)
    assert torch.signbit(unpack(parts)[0, 0])


@pytest.mark.parametrize(("sparsity", "most"), [(0.75, 0.29), (0.9, 0.14)])
def test_size_of_a_float32_target(sparsity, most):
    tensor = torch.randn(192, 768)
    tensor.view(-1)[torch.randperm(tensor.numel())[: int(sparsity * tensor.numel())]] = 0
    parts = pack(tensor)
    assert set(parts) == {SHAPE, VALUES, BITMASK}
    assert num_bytes(parts) <= most * tensor.numel() * 4


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("shape", [(64, 128), (16, 32, 3, 3)])
def test_patterns_take_fewer_bits_than_a_bitmask(n, m, shape):
    tensor = prune_nm(shape, n, m)
    parts = assert_round_trip(tensor)
    bitmask_bytes = (tensor != 0).sum() * 4 + tensor.numel() // 8
    assert set(parts) == {SHAPE, VALUES, CODES}
    assert num_bytes(parts) < bitmask_bytes
    assert parts[VALUES].shape == (tensor.numel() // m, n)


def test_two_of_four_takes_three_bits_a_group():
    parts = pack(prune_nm((64, 64), 2, 4))
    assert parts[CODES].numel() * 8 == 3 * 64 * 64 // 4


def test_dense_empty_and_scalar_tensors_stay_as_they_are():
    for tensor in (torch.randn(8, 8), torch.zeros(0, 4), torch.tensor(1.0), torch.zeros(0), torch.randn(3)):
        assert pack(tensor) is None


def test_other_devices_and_dtypes_follow_the_parts():
    tensor = prune_nm((32, 16, 3, 3), 2, 4)
    parts = pack(tensor)
    meta = unpack({name: part.to("meta") for name, part in parts.items()})
    assert meta.is_meta
    assert meta.shape == tensor.shape
    cast = unpack(parts | {VALUES: parts[VALUES].bfloat16()})
    assert torch.equal(cast, tensor.bfloat16())


@pytest.mark.parametrize(("n", "m"), [(None, None), *PATTERNS])
def test_every_device_expands_alike(n, m):
    """What other devices than the CPU run, run on the CPU."""
    tensor = prune_nm((24, 40), n, m) if n else unstructured()
    parts = pack(tensor)
    bitmask = compression.check_parts(parts, "x")
    flat = torch.zeros(tensor.numel(), dtype=torch.int32)
    compression._scatter_on_device(flat, bitmask, parts[VALUES].view(-1).view(torch.int32))
    assert torch.equal(flat, bits(tensor))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 63, 64, 65, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 9])
def test_bitmask_and_values_equal_a_plain_loop_over_chunk_borders(numel, sparsity):
    random = np.random.default_rng(numel)
    array = random.integers(1, 100, numel).astype(np.int16) * (random.random(numel) >= sparsity).astype(np.int16)
    bitmask = compression._mark(array)
    assert np.array_equal(np.unpackbits(bitmask, bitorder="little")[:numel], array != 0)
    assert compression._count(bitmask) == np.count_nonzero(array)
    values = compression._gather(array, bitmask, np.count_nonzero(array))
    assert np.array_equal(values, array[array != 0])
    restored = np.zeros_like(array)
    compression._scatter(restored, bitmask, values)
    assert np.array_equal(restored, array)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_codes_equal_a_plain_loop(n, m):
    """Rank by rank into one long number, least significant first."""
    bitmask = compression._mark(bits(prune_nm((3, 24), n, m)).numpy())
    width = CODE_BITS[n, m]
    patterns = [
        byte for byte in range(256) if all(bin(byte >> shift & 2**m - 1).count("1") == n for shift in range(0, 8, m))
    ]
    number = sum(patterns.index(byte) << place * width for place, byte in enumerate(bitmask))
    packed = compression._pack_codes(bitmask, n, m)
    assert packed.tobytes() == number.to_bytes(-(-len(bitmask) // 8) * width, "little")
    assert np.array_equal(compression._unpack_codes(torch.from_numpy(packed), n, m)[: len(bitmask)], bitmask)
