"""Safetensors files: what they store, and files that lie."""

import json
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from support.int8 import make_block_weight
from support.packing import DTYPES, bits, prune_nm, random_bits, unstructured

from cap_hf import CAPError
from cap_hf.checkpoints import files
from cap_hf.checkpoints.compression import pack
from cap_hf.checkpoints.files import check_file, load_file, open_safetensors, save_file
from cap_hf.checkpoints.int8 import pack_int8, unpack_any


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_a_file(dtype, tmp_path):
    tensor = random_bits((64, 64), dtype, 1)
    bits(tensor)[torch.arange(64 * 64) % 5 > 0] = 0
    parts = pack(tensor)
    try:
        save_plain({"x.weight": tensor}, tmp_path / "plain.safetensors")
    except (KeyError, ValueError):
        return  # safetensors has no such dtype, so no checkpoint has
    save_file({f"x.weight.{name}": part for name, part in parts.items()}, tmp_path / "packed.safetensors")
    loaded = load_file(tmp_path / "packed.safetensors")["x.weight"]
    assert loaded.dtype == tensor.dtype
    assert torch.equal(bits(loaded), bits(tensor))


def packed_file(path, tensor=None):
    tensor = prune_nm((16, 32), 2, 4) if tensor is None else tensor
    tensors = {f"x.weight.{name}": part for name, part in pack(tensor).items()}
    save_plain(tensors | {"y": torch.ones(3)}, path)
    return tensors


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
    save_plain(tensors, tmp_path / "x.safetensors")
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
    save_plain(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CAPError, match="damaged"):
        load_file(tmp_path / "x.safetensors")


def test_what_fills_up_the_last_codes_must_be_zero(tmp_path):
    tensor = prune_nm((61, 8), 2, 4)
    tensors = {f"x.weight.{name}": part for name, part in pack(tensor).items()}
    tensors["x.weight.cap_codes"][-1] |= 4
    save_plain(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CAPError, match="damaged"):
        check_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "parts",
    [
        pack(unstructured()),
        pack(prune_nm((16, 32), 2, 4)),
        pack_int8(make_block_weight(16, 30, 0.75), "x"),
        pack_int8(prune_nm((16, 32), 2, 4).half(), "x"),
    ],
)
def test_fuzzed_files_are_refused_or_hold_what_was_written(parts, tmp_path):
    path = tmp_path / "x.safetensors"
    written = {"x.weight": unpack_any(parts), "y": torch.ones(3)}
    save_file({f"x.weight.{name}": part for name, part in parts.items()} | {"y": written["y"]}, path)
    original = path.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    random = np.random.default_rng(0)
    refused = 0
    for round_ in range(400):
        data = bytearray(original)
        kind = round_ % 5
        if kind == 0:
            data = data[: random.integers(len(data))]
        elif kind == 1:  # the header
            data[random.integers(header)] = random.integers(256)
        elif kind == 2:  # anywhere, several bytes
            for place in random.integers(len(data), size=random.integers(1, 9)):
                data[place] = random.integers(256)
        elif kind == 3:  # digits of shapes, offsets and digests
            places = [place for place in range(8, header) if chr(data[place]).isdigit()]
            data[places[random.integers(len(places))]] = ord("0") + random.integers(10)
        else:  # one bit of what the tensors hold
            data[random.integers(header, len(data))] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            loaded = load_file(path)
        except CAPError:
            refused += 1
            continue
        assert loaded.keys() == written.keys()
        assert all(torch.equal(bits(loaded[name]), bits(each)) for name, each in written.items())
    assert refused > 300


def test_a_flipped_bit_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {f"x.weight.{name}": part for name, part in pack(unstructured()).items()} | {"y": torch.ones(3)}
    save_file(tensors, path)
    assert set(check_file(path).digests) == set(tensors)
    for name in ("x.weight.cap_values", "y"):
        flipped = {key: each.clone() for key, each in tensors.items()}
        flipped[name].view(torch.int32)[1] ^= 1
        save_file(flipped, tmp_path / "other.safetensors")
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        (tmp_path / "flipped.safetensors").write_bytes(
            path.read_bytes()[:header] + (tmp_path / "other.safetensors").read_bytes()[header:]
        )
        with pytest.raises(CAPError, match=f"holds other bytes in {name} than were written"):
            load_file(tmp_path / "flipped.safetensors")


def test_a_digest_is_of_name_dtype_shape_and_bytes():
    tensor = torch.arange(6, dtype=torch.int32)
    same = files.digest("x", tensor.clone())
    others = [
        files.digest("y", tensor),
        files.digest("x", tensor.view(torch.float32)),
        files.digest("x", tensor.view(2, 3)),
        files.digest("x", tensor + 1),
    ]
    assert files.digest("x", tensor) == same
    assert len({same, *others}) == 5
    assert len(same) == 32


def test_files_of_earlier_versions_have_no_digests_and_load(tmp_path):
    packed_file(tmp_path / "x.safetensors", unstructured())
    assert check_file(tmp_path / "x.safetensors").digests is None
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x.weight"], unstructured())


def test_fewer_digests_than_tensors_are_refused(tmp_path):
    save_plain({"y": torch.ones(3)}, tmp_path / "y.safetensors", metadata={"cap_digests": "0" * 31})
    with pytest.raises(CAPError, match="has not one digest per tensor"):
        check_file(tmp_path / "y.safetensors")


def raw_file(path, data=b"", **entries):
    """A safetensors file whose header says anything at all."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("name", ["x", "x.weight.cap_shape"])
@pytest.mark.parametrize(
    "shape", [[0, 2**63], [0, 2**64 - 1], [0, 2**64], [0, 2**62, 8], [0, -1], [0, 1.5], "0", [[0]]]
)
def test_dimensions_that_no_tensor_has(name, shape, tmp_path):
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    path = raw_file(tmp_path / "x.safetensors", **{name: entry})
    for read in (check_file, load_file):
        with pytest.raises(CAPError, match=r"damaged|cannot be read as safetensors") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F4", "F99", 3])
@pytest.mark.parametrize("name", ["x", "x.weight.cap_values", "x.weight.cap_bitmask"])
def test_dtypes_that_pytorch_has_not(name, dtype, tmp_path):
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, 3]}
    path = raw_file(tmp_path / "x.safetensors", b"123", **{name: entry})
    with pytest.raises(CAPError, match=r"damaged|cannot be read as safetensors|has the parts"):
        load_file(path)


def test_more_than_the_memory_that_is_free_is_refused(tmp_path, monkeypatch):
    """A file grows to 64 times its size at most; what fits is decided before anything is unpacked."""
    zeros = torch.zeros(1 << 15, 8, dtype=torch.float64)
    parts = {f"x.weight.{name}": part for name, part in pack(zeros).items()}
    save_file(parts, tmp_path / "x.safetensors")
    contents = check_file(tmp_path / "x.safetensors")
    assert contents.dense_bytes == zeros.numel() * 8
    assert contents.dense_bytes <= 64 * (tmp_path / "x.safetensors").stat().st_size
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: memory(contents.dense_bytes))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x.weight"], zeros)
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: memory(contents.dense_bytes - 1))
    monkeypatch.setattr(files, "unpack_any", None)
    with pytest.raises(CAPError, match=r"unpacks to 0\.0 GB, and 0\.0 GB of memory are free"):
        load_file(tmp_path / "x.safetensors")


def test_an_error_of_what_is_read_is_one_line_too(tmp_path):
    save_plain({"y": torch.ones(3)}, tmp_path / "y.safetensors")
    with (
        pytest.raises(CAPError, match="cannot be read as safetensors"),
        open_safetensors(tmp_path / "y.safetensors") as f,
    ):
        f.get_tensor("z")


def test_a_huge_declared_size_is_refused_before_any_memory_is_taken(tmp_path):
    shape = torch.empty(0, 2**20, 2**20, dtype=torch.uint8)
    tensors = {"x.weight.cap_shape": shape, "x.weight.cap_values": torch.ones(1)}
    save_plain(tensors | {"x.weight.cap_bitmask": torch.ones(1, dtype=torch.uint8)}, tmp_path / "x.safetensors")
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
    save_plain({"y": torch.arange(5)}, tmp_path / "y.safetensors")
    assert torch.equal(load_file(tmp_path / "y.safetensors")["y"], load_plain(tmp_path / "y.safetensors")["y"])
    with pytest.raises(CAPError, match="cannot be read"):
        load_file(tmp_path / "missing.safetensors")
