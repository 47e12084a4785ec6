"""Round trips bit for bit, sizes, and files that lie."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file

from cap_hf import CAPError
from cap_hf.checkpoints import compression
from cap_hf.checkpoints.compression import (
    BITMASK,
    CHUNK,
    CODES,
    INTEGERS,
    SHAPE,
    VALUES,
    check_file,
    load_file,
    pack,
    unpack,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
# Bits of a code: 16, 16, 36, 16, 8, 28, 70 and 8 bytes have N ones in each group of M bits.
CODE_BITS = {(1, 2): 4, (1, 4): 4, (2, 4): 6, (3, 4): 4, (1, 8): 3, (2, 8): 5, (4, 8): 7, (7, 8): 3}
PATTERNS = [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (7, 8)]


def bits(tensor):
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def random_bits(shape, dtype, seed):
    """Any bit pattern: NaN payloads, infinities and -0.0 among them."""
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    return torch.frombuffer(bytearray(raw) or bytearray(8), dtype=dtype)[: math.prod(shape)].clone().view(shape)


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


def prune_nm(shape, n, m, seed=0):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    channels_last = tensor.movedim(1, -1) if tensor.dim() == 4 else tensor
    groups = channels_last.reshape(-1, m).clone()
    groups.scatter_(1, groups.abs().argsort(dim=1)[:, : m - n], 0.0)
    groups = groups.view(channels_last.shape)
    return groups.movedim(-1, 1).contiguous() if tensor.dim() == 4 else groups


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_a_file(dtype, tmp_path):
    tensor = random_bits((64, 64), dtype, 1)
    bits(tensor)[torch.arange(64 * 64) % 5 > 0] = 0
    parts = assert_round_trip(tensor)
    try:
        save_file({"x.weight": tensor}, tmp_path / "plain.safetensors")
    except (KeyError, ValueError):
        return  # safetensors has no such dtype, so no checkpoint has
    save_file({f"x.weight.{name}": part for name, part in parts.items()}, tmp_path / "packed.safetensors")
    loaded = load_file(tmp_path / "packed.safetensors")["x.weight"]
    assert loaded.dtype == tensor.dtype
    assert torch.equal(bits(loaded), bits(tensor))


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
    bitmask = compression._check(parts, "x")
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


def packed_file(path, tensor=None):
    tensor = prune_nm((16, 32), 2, 4) if tensor is None else tensor
    tensors = {f"x.weight.{name}": part for name, part in pack(tensor).items()}
    save_file(tensors | {"y": torch.ones(3)}, path)
    return tensors


def unstructured():
    tensor = torch.randn(9, 13, generator=torch.Generator().manual_seed(0))
    tensor[tensor.abs() < 1] = 0
    return tensor


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("x.weight.cap_values"),
        lambda t: t.pop("x.weight.cap_bitmask"),
        lambda t: t.pop("x.weight.cap_shape"),
        lambda t: t.update({"x.weight": torch.ones(9, 13)}),
        lambda t: t.update({"x.weight.cap_codes": torch.zeros(3, dtype=torch.uint8)}),
        lambda t: t.update({"x.weight.cap_values": t["x.weight.cap_values"][1:].clone()}),
        lambda t: t.update({"x.weight.cap_values": t["x.weight.cap_values"][None].clone()}),
        lambda t: t.update({"x.weight.cap_bitmask": t["x.weight.cap_bitmask"][1:].clone()}),
        lambda t: t.update({"x.weight.cap_bitmask": t["x.weight.cap_bitmask"].float()}),
        lambda t: t["x.weight.cap_bitmask"].bitwise_xor_(1),
        lambda t: t["x.weight.cap_bitmask"][-1:].bitwise_xor_(128),
        lambda t: t.update({"x.weight.cap_shape": torch.empty(0, 9, 14, dtype=torch.uint8)}),
        lambda t: t.update({"x.weight.cap_shape": torch.empty(0, 2**31, 2**31, dtype=torch.uint8)}),
        lambda t: t.update({"x.weight.cap_shape": torch.empty(0, dtype=torch.uint8)}),
        lambda t: t.update({"x.weight.cap_shape": torch.ones(1, 9, 13, dtype=torch.uint8)}),
    ],
)
def test_parts_that_contradict_each_other(damage, tmp_path):
    tensors = packed_file(tmp_path / "x.safetensors", unstructured())
    damage(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CAPError, match=r"damaged|cannot be read"):
        load_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t["x.weight.cap_codes"].fill_(255),
        lambda t: t.update({"x.weight.cap_codes": t["x.weight.cap_codes"][:-1].clone()}),
        lambda t: t.update({"x.weight.cap_values": t["x.weight.cap_values"].view(-1)}),
        lambda t: t.update({"x.weight.cap_values": t["x.weight.cap_values"].view(-1, 4)}),
        lambda t: t.update({"x.weight.cap_values": t["x.weight.cap_values"][:, :0].clone()}),
        lambda t: t.update({"x.weight.cap_values": torch.empty(0, 2)}),
        lambda t: t.update({"x.weight.cap_shape": torch.empty(0, 16, 64, dtype=torch.uint8)}),
        lambda t: t.update({"x.weight.cap_shape": torch.empty(0, 16, 0, dtype=torch.uint8)}),
    ],
)
def test_codes_that_contradict_their_values(damage, tmp_path):
    tensors = packed_file(tmp_path / "x.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CAPError, match="damaged"):
        load_file(tmp_path / "x.safetensors")


def test_what_fills_up_the_last_codes_must_be_zero(tmp_path):
    tensor = prune_nm((61, 8), 2, 4)
    tensors = {f"x.weight.{name}": part for name, part in pack(tensor).items()}
    tensors["x.weight.cap_codes"][-1] |= 4
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CAPError, match="damaged"):
        check_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("make", [unstructured, lambda: prune_nm((16, 32), 2, 4)])
def test_fuzzed_files_end_in_a_value_error_or_in_whole_tensors(make, tmp_path):
    path = tmp_path / "x.safetensors"
    packed_file(path, make())
    original = path.read_bytes()
    names = set(load_file(path))
    random = np.random.default_rng(0)
    refused = 0
    for round_ in range(400):
        data = bytearray(original)
        kind = round_ % 4
        if kind == 0:
            data = data[: random.integers(len(data))]
        elif kind == 1:  # the header
            data[random.integers(min(len(data), 500))] = random.integers(256)
        elif kind == 2:  # anywhere, several bytes
            for place in random.integers(len(data), size=random.integers(1, 9)):
                data[place] = random.integers(256)
        else:  # digits of shapes and offsets
            places = [place for place in range(8, 500) if place < len(data) and chr(data[place]).isdigit()]
            data[places[random.integers(len(places))]] = ord("0") + random.integers(10)
        path.write_bytes(data)
        try:
            loaded = load_file(path)
        except ValueError:
            refused += 1
            continue
        # Whatever is accepted is no larger than the file lets it be.
        assert len(loaded) <= len(names) + 2
        assert all(tensor.numel() <= 64 * len(data) for tensor in loaded.values())
    assert refused > 200


def test_a_huge_declared_size_is_refused_before_any_memory_is_taken(tmp_path):
    shape = torch.empty(0, 2**20, 2**20, dtype=torch.uint8)
    tensors = {"x.weight.cap_shape": shape, "x.weight.cap_values": torch.ones(1)}
    save_file(tensors | {"x.weight.cap_bitmask": torch.ones(1, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    with pytest.raises(CAPError, match="damaged"):
        load_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("head", [b"\xff" * 8, (1 << 40).to_bytes(8, "little"), bytes(8), b""])
def test_a_header_that_lies_about_its_length_is_refused(head, tmp_path):
    packed_file(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(head + data[8:] if head else head)
    with pytest.raises(CAPError, match="cannot be read as safetensors"):
        load_file(tmp_path / "x.safetensors")


def test_plain_files_load_as_they_are(tmp_path):
    save_file({"y": torch.arange(5)}, tmp_path / "y.safetensors")
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], load_plain(tmp_path / "y.safetensors")["y"])
    with pytest.raises(CAPError, match="cannot be read"):
        load_file(tmp_path / "missing.safetensors")
