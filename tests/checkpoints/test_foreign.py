"""Weights in parts, as other libraries store them: found among names, checked by their headers, put together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.foreign import bitmask_parts, two_of_four

from cap_hf.checkpoints.foreign import check_headers, dense_bytes, find_parts, join
from cap_hf.errors import CAPError

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"} | DTYPES


def headers_of(parts):
    return {part: (tuple(tensor.shape), NAMES[tensor.dtype]) for part, tensor in parts.items()}


def put_together(parts):
    check_headers("layer.weight", headers_of(parts))
    return join("layer.weight", parts)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def sparse(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, weight, torch.zeros(())).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_bitmask(shape, dtype, seed):
    weight = sparse(shape, dtype, seed)
    weight.view(-1)[0] = 1  # the writer of the tests needs one value
    parts = bitmask_parts(weight)
    assert_same_bits(put_together(parts), weight)
    assert dense_bytes(headers_of(parts)) >= weight.numel() * weight.element_size()


@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 20), (2, 6)])
def test_two_of_four_with_zeros_among_those_that_are_kept(shape):
    weight = sparse(shape)
    kept = two_of_four(weight)
    assert_same_bits(put_together(bitmask_parts(weight, kept)), torch.where(kept, weight, torch.zeros(())))


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.uint8])
def test_masks_leave_plain_zeros_of_negative_and_infinite_weights(mask_dtype):
    weight = torch.tensor([[-1.0, 2.0, -torch.inf], [3.0, -4.0, 5.0]])
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(mask_dtype)
    expected = torch.tensor([[0.0, 2.0, 0.0], [3.0, -4.0, 0.0]])
    assert_same_bits(put_together({"_orig": weight, "_mask": mask}), expected)


def test_parts_are_found_among_other_names():
    names = [*(f"a.{part}" for part in ("shape", "compressed", "bitmask", "row_offsets")), "b.weight_orig", "b.bias"]
    names += ["b.weight_mask", "c.in_proj_weight_orig", "c.in_proj_weight_mask", "d.attention_mask", "e.shape"]
    names += ["f.g.weight", "__nncf_hooks.post_hooks.f:g:weight__0.0.binary_mask"]
    assert find_parts(names) == {
        "a.weight": {part: f"a.{part}" for part in ("shape", "compressed", "bitmask", "row_offsets")},
        "b.weight": {"_orig": "b.weight_orig", "_mask": "b.weight_mask"},
        "c.in_proj_weight": {"_orig": "c.in_proj_weight_orig", "_mask": "c.in_proj_weight_mask"},
        "f.g.weight": {"_orig": "f.g.weight", "_mask": "__nncf_hooks.post_hooks.f:g:weight__0.0.binary_mask"},
    }


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["a.compressed", "a.shape"], "a.bitmask is missing, and a.compressed is there"),
        (["a.bitmask", "a.compressed"], "a.shape is missing"),
        (["a.weight_orig", "a.weight_u"], "a.weight_mask is missing, and a.weight_orig is there"),
        (["a.bias_mask", "a.bias"], "a.bias is stored twice, once as a.bias_mask"),
        (["a.weight_mask"], "a.weight_orig is missing"),
        (["a.weight", "a.compressed", "a.shape", "a.bitmask"], "a.weight is stored twice"),
        (["a.weight_orig", "a.weight_mask", "a.compressed"], "a.weight is stored twice"),
        (["a.parametrizations.weight.original"], "a.parametrizations.weight.original is a parametrization"),
        (["__nncf_hooks.post_hooks.a:weight__0.0.binary_mask"], "is of NNCF, and no mask of a weight that is there"),
        (["a.weight", "__nncf_hooks.post_hooks.a:weight__0.0.mask"], "0.mask is of NNCF, and no mask"),
    ],
)
def test_what_is_missing_or_there_twice(names, line):
    with pytest.raises(CAPError, match=line):
        find_parts(names)


def spoil(part, change):
    def spoiled(parts):
        parts[part] = change(parts[part])

    return spoiled


DAMAGES = {
    "rows": (spoil("shape", lambda shape: shape + torch.tensor([1, 0])), "its bitmask has the shape"),
    "columns": (spoil("shape", lambda shape: shape * torch.tensor([1, 50])), "its bitmask has the shape"),
    "huge": (spoil("shape", lambda shape: shape + 2**61), "its bitmask has the shape"),
    "negative": (spoil("shape", lambda shape: -shape), "its bitmask has the shape"),
    "many": (spoil("shape", lambda _: torch.ones(99, dtype=torch.int64)), r"its shape is a tensor of I64"),
    "floats": (spoil("shape", lambda shape: shape.float()), "its shape is a tensor of F32"),
    "bits": (spoil("bitmask", lambda bits: bits.int()), "its bitmask is made of I32"),
    "beyond": (spoil("bitmask", lambda bits: bits | 128), "bits beyond the end of a row"),
    "empty": (spoil("bitmask", lambda bits: bits[:0]), "its bitmask is empty"),
    "short": (spoil("compressed", lambda values: values[:-1]), "bits, for"),
    "cube": (spoil("compressed", lambda values: values[None, None]), "its values have 3 dimensions"),
    "int8": (spoil("compressed", lambda values: values.to(torch.int8)), "so it is quantised"),
    "offsets": (spoil("row_offsets", lambda offsets: offsets + 1), "its row_offsets are not those"),
    "offset": (spoil("row_offsets", lambda offsets: offsets[:1]), "its row_offsets are not those"),
    "reals": (spoil("row_offsets", lambda offsets: offsets.float()), "its row_offsets are made of F32"),
    "none": (lambda parts: parts.pop("row_offsets"), "lacks row_offsets"),
    "flat": (spoil("compressed", lambda values: values[None]), "has row_offsets, which 2:4"),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_bitmasks(damage, line):
    parts = bitmask_parts(sparse((4, 6)))
    assert put_together(dict(parts)) is not None
    damage(parts)
    with pytest.raises(CAPError, match=line):
        put_together(parts)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (spoil("compressed", lambda values: values[:, :-1]), "its 2:4 values have the shape"),
        (spoil("bitmask", lambda bits: torch.full_like(bits, 0b01110001)), "its bitmask is not 2:4"),
        (spoil("shape", lambda shape: shape.flatten()[:1]), "its bitmask has the shape"),
    ],
)
def test_damaged_two_of_four(damage, line):
    weight = sparse((4, 8))
    parts = bitmask_parts(weight, two_of_four(weight))
    damage(parts)
    with pytest.raises(CAPError, match=line):
        put_together(parts)


def test_damaged_masks():
    weight = torch.ones(2, 3)
    for mask, line in ((torch.ones(3, 2), "its mask has the shape"), (torch.full((2, 3), 0.5), "other values than 0")):
        with pytest.raises(CAPError, match=line):
            put_together({"_orig": weight, "_mask": mask})
    with pytest.raises(CAPError, match="is stored in I8, so it is quantised"):
        put_together({"_orig": weight.to(torch.int8), "_mask": weight})
