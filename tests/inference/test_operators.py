"""The kernel as an operator of PyTorch: known to its compiler, and to autograd as something without a gradient."""

import pytest
import torch
from support.inference import make_weight

from cap_hf.inference.int8_packing import pack_int8
from cap_hf.inference.operators import (
    fake_quantize_tokens,
    fake_sparse_int8_linear,
    fake_sparse_linear,
    has_int8_kernel,
    has_kernel,
    sparse_int8_linear,
    sparse_linear,
)
from cap_hf.inference.packing import pack


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_kernel(), "no C++ compiler: the kernel cannot be tested"
    assert has_int8_kernel()


def test_shape_and_dtype_are_known_without_computing():
    x = torch.empty(2, 9, 30, dtype=torch.bfloat16, device="meta")
    y = fake_sparse_linear(x, None, None, None, None, None, 20, 30, 32, 30)
    assert (y.shape, y.dtype, y.device) == ((2, 9, 20), torch.bfloat16, x.device)


def test_shapes_of_int8_are_known_without_computing():
    x = torch.empty(2, 9, 30, dtype=torch.bfloat16, device="meta")
    y = fake_sparse_int8_linear(x, None, None, None, None, None, None, None, 20, 30, 32, 8)
    assert (y.shape, y.dtype, y.device) == ((2, 9, 20), torch.bfloat16, x.device)
    quantized, scales = fake_quantize_tokens(x)
    assert (quantized.shape, quantized.dtype) == (x.shape, torch.uint8)
    assert (scales.shape, scales.dtype) == ((2, 9, 1), torch.float32)


def test_what_nobody_calls_is_not_registered():
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("cap_hf::")}
    assert "cap_hf::sparse_linear" in schemas
    assert "cap_hf::instruction_set" not in schemas


def test_operator_is_registered_as_pytorch_asks():
    packed, bias = pack(make_weight(20, 30, 0.5)), torch.randn(20)
    args = (torch.randn(2, 9, 30), *list(vars(packed).values())[:4], bias, 20, 30, packed.row_block, packed.col_block)
    torch.library.opcheck(torch.ops.cap_hf.sparse_linear.default, args, test_utils=("test_schema", "test_faketensor"))


def test_int8_operators_are_registered_as_pytorch_asks():
    packed, bias, x = pack_int8(make_weight(20, 30, 0.5)), torch.randn(20), torch.randn(2, 9, 30)
    args = (x, *list(vars(packed).values())[:6], bias, 20, 30, packed.row_block, packed.col_block)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cap_hf.sparse_int8_linear.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.cap_hf.quantize_tokens.default, (x,), test_utils=checks)


def test_backward_is_an_error():
    x = torch.randn(2, 30, requires_grad=True)
    y = sparse_linear(x, pack(make_weight(20, 30, 0.5)))
    with pytest.raises(RuntimeError, match="sparse_linear"):
        (y.sum() + x.sum()).backward()
    y = sparse_int8_linear(x, pack_int8(make_weight(20, 30, 0.5)))
    with pytest.raises(RuntimeError, match="sparse_int8_linear"):
        (y.sum() + x.sum()).backward()


def test_with_and_without_gradients_the_operator_gives_the_same():
    x, packed = torch.randn(2, 30), pack(make_weight(20, 30, 0.5))
    expected = sparse_linear(x, packed)
    assert expected.grad_fn is None
    with torch.no_grad():
        assert torch.equal(sparse_linear(x.requires_grad_(), packed), expected)
    with torch.inference_mode():
        assert torch.equal(sparse_linear(x, packed), expected)
    assert sparse_linear(x, packed).requires_grad


def test_backward_past_the_wrapper_is_an_error_too():
    x, packed = torch.randn(2, 30, requires_grad=True), pack(make_weight(20, 30, 0.5))
    parts = list(vars(packed).values())[:4]
    y = torch.ops.cap_hf.sparse_linear(x, *parts, None, 20, 30, packed.row_block, packed.col_block)
    with pytest.raises(RuntimeError, match="cap_hf::sparse_linear is for inference only"):
        y.sum().backward()
