"""Two sparse int8 layers with a GELU between them, in one call: the bits of two calls, for every shape and caller."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import has_instruction_set, in_threads, make_weight
from support.int8 import INT8_INSTRUCTION_SETS, make_block_weight
from torch.nn import functional

from cap_hf.inference.int8_packing import pack_int8, unpack_int8
from cap_hf.inference.operators import has_int8_kernel, sparse_int8_linear, sparse_int8_mlp


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel(), "no C++ compiler: the kernel cannot be tested"


def supported(instruction_set):
    one = pack_int8(torch.ones(1, 1))
    return has_instruction_set(sparse_int8_linear, torch.ones(1, 1), one, None, instruction_set)


def two_calls(x, first, first_bias, second, second_bias, name=""):
    hidden = sparse_int8_linear(x, first, first_bias, name, gelu=True)
    return sparse_int8_linear(hidden, second, second_bias, name)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.one_of(st.integers(1, 70), st.sampled_from([197, 257])),
    sizes=st.tuples(*[st.one_of(st.integers(1, 40), st.sampled_from([129, 150, 300]))] * 3),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    biased=st.booleans(),
    name=st.sampled_from([*INT8_INSTRUCTION_SETS, ""]),
)
def test_bits_are_those_of_two_calls(seed, tokens, sizes, sparsity, biased, name):
    if name and not supported(name):
        return
    cols, hidden, rows = sizes
    x = 3 * torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
    x[seed % tokens, seed % cols] = [torch.nan, torch.inf, 0.0, 1e-40][seed % 4]
    first = pack_int8(make_block_weight(hidden, cols, sparsity, seed))
    second = pack_int8(make_block_weight(rows, hidden, sparsity, seed + 1))
    biases = (torch.arange(hidden) / 7, torch.arange(rows) / 5) if biased else (None, None)
    expected = two_calls(x, first, biases[0], second, biases[1], name)
    found = sparse_int8_mlp(x, first, biases[0], second, biases[1], name)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_it_is_about_what_the_floats_give():
    x, first, second = torch.randn(70, 40), pack_int8(make_weight(90, 40, 0.5)), pack_int8(make_weight(30, 90, 0.5))
    weights = [unpack_int8(each).float() * each.scales[:, None] for each in (first, second)]
    expected = functional.gelu(x @ weights[0].t()) @ weights[1].t()
    found = sparse_int8_mlp(x, first, None, second)
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 3, 40)])
def test_leading_dimensions_are_kept(shape):
    first, second = pack_int8(make_weight(50, 40, 0.5)), pack_int8(make_weight(30, 50, 0.5))
    x = torch.randn(shape)
    found = sparse_int8_mlp(x, first, None, second)
    assert found.shape == (*shape[:-1], 30)
    assert torch.equal(found, two_calls(x, first, None, second, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_out_and_is_not_between(dtype):
    first, second = pack_int8(make_weight(50, 40, 0.5)), pack_int8(make_weight(30, 50, 0.5))
    x = torch.randn(9, 40).to(dtype)
    found = sparse_int8_mlp(x, first, torch.ones(50, dtype=dtype), second, torch.ones(30, dtype=dtype))
    assert found.dtype == dtype
    assert torch.equal(found, two_calls(x.float(), first, torch.ones(50), second, torch.ones(30)).to(dtype))


def test_more_tokens_than_fit_the_working_memory():
    first, second = pack_int8(make_block_weight(4000, 8, 0.9)), pack_int8(make_block_weight(8, 4000, 0.9))
    x = torch.randn(1100, 8)
    assert torch.equal(sparse_int8_mlp(x, first, None, second), two_calls(x, first, None, second, None))


def test_several_threads_of_pytorch_and_of_python_at_once():
    first, second = pack_int8(make_block_weight(300, 60, 0.5)), pack_int8(make_block_weight(60, 300, 0.5))
    x = torch.randn(400, 60)
    expected = two_calls(x, first, None, second, None)
    assert all(torch.equal(found, expected) for found in in_threads(lambda: sparse_int8_mlp(x, first, None, second)))


def test_layers_that_do_not_fit_each_other_are_refused():
    first, second = pack_int8(make_weight(50, 40, 0.5)), pack_int8(make_weight(30, 51, 0.5))
    with pytest.raises(RuntimeError, match="the second layer takes 51 numbers and the first one gives 50"):
        sparse_int8_mlp(torch.randn(9, 40), first, None, second)
    with pytest.raises(RuntimeError, match="its last size must be 40"):
        sparse_int8_mlp(torch.randn(9, 41), first, None, pack_int8(make_weight(30, 50, 0.5)))
