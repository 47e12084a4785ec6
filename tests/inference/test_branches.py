"""The residual branches in one call: the bits of their parts, one after the other, on every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import has_instruction_set, in_threads
from support.int8 import INT8_INSTRUCTION_SETS, layer_norm_reference, make_block_weight
from torch.autograd import forward_ad
from torch.nn import functional

from cap_hf.inference.branches import Norm, listed, sparse_int8_attention_branch, sparse_int8_mlp_branch
from cap_hf.inference.int8_packing import pack_int8
from cap_hf.inference.operators import has_int8_kernel, int8_attention, sparse_int8_linear, sparse_int8_mlp


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel(), "no C++ compiler: the kernel cannot be tested"


def supported(name):
    one = pack_int8(torch.ones(1, 1))
    return not name or has_instruction_set(sparse_int8_linear, torch.ones(1, 1), one, None, name)


def make_layer(rows, cols, seed, sparsity=0.5, biased=True):
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) if biased else None
    return pack_int8(make_block_weight(rows, cols, sparsity, seed)), bias


def make_norm(cols, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Norm(1 + torch.rand(cols, generator=generator), torch.randn(cols, generator=generator), 1e-6)


def normal(x, norm):
    return layer_norm_reference(x, norm.weight, norm.bias, norm.epsilon)


def add(x, y, factors):
    return x + (y if factors is None else y * factors)


def attention_by_parts(x, norm, query, key, value, heads, scale, output, factors, name=""):
    images, tokens, _ = x.shape
    q, k, v = (
        sparse_int8_linear(normal(x, norm), *layer, name).view(images, tokens, heads, -1).transpose(1, 2)
        for layer in (query, key, value)
    )
    attended = int8_attention(q, k, v, scale, name).reshape(images, tokens, -1)
    return add(x, sparse_int8_linear(attended, *output, name), factors)


def mlp_by_parts(x, norm, first, second, factors, name=""):
    return add(x, sparse_int8_mlp(normal(x, norm), *first, *second, name), factors)


SIZES = {
    "seed": st.integers(0, 10**6),
    "images": st.integers(1, 3),
    "tokens": st.one_of(st.integers(1, 40), st.sampled_from([65, 197])),
    "cols": st.one_of(st.integers(1, 40), st.sampled_from([129, 150])),
    "sparsity": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "biased": st.booleans(),
    "scaled": st.booleans(),
    "name": st.sampled_from([*INT8_INSTRUCTION_SETS, ""]),
}


def make_input(seed, images, tokens, cols, scaled):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(images, tokens, cols, generator=generator) + 1
    return x, torch.randn(cols, generator=generator) if scaled else None


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 4), size=st.integers(1, 20), **SIZES)
def test_attention_has_the_bits_of_its_parts(heads, size, seed, images, tokens, cols, sparsity, biased, scaled, name):
    if not supported(name):
        return
    x, factors = make_input(seed, images, tokens, cols, scaled)
    inner = heads * size
    layers = [make_layer(inner, cols, seed + each, sparsity, biased) for each in range(3)]
    output = make_layer(cols, inner, seed + 3, sparsity, biased)
    args = (x, make_norm(cols, seed), *layers, heads, 0.3, output, factors, name)
    assert torch.equal(sparse_int8_attention_branch(*args), attention_by_parts(*args))


@settings(max_examples=60, deadline=None)
@given(hidden=st.one_of(st.integers(1, 40), st.sampled_from([150, 300])), **SIZES)
def test_an_mlp_has_the_bits_of_its_parts(hidden, seed, images, tokens, cols, sparsity, biased, scaled, name):
    if not supported(name):
        return
    x, factors = make_input(seed, images, tokens, cols, scaled)
    first, second = (make_layer(*sizes, seed, sparsity, biased) for sizes in ((hidden, cols), (cols, hidden)))
    args = (x, make_norm(cols, seed), first, second, factors, name)
    assert torch.equal(sparse_int8_mlp_branch(*args), mlp_by_parts(*args))


def test_layernorm_is_that_of_pytorch_but_for_its_last_bits():
    """With layers that change nothing but the scale, what comes out is what went in and its LayerNorm, rounded."""
    x, norm = torch.randn(2, 33, 96) * 5 + 2, make_norm(96)
    expected = functional.layer_norm(x, (96,), norm.weight, norm.bias, norm.epsilon)
    torch.testing.assert_close(normal(x, norm), expected, rtol=1e-5, atol=1e-5)
    one = pack_int8(torch.eye(96)), None
    found = sparse_int8_mlp_branch(x, norm, one, one) - x
    wanted = functional.gelu(expected)
    # Each number is rounded twice, to a 127th of the largest of its token.
    assert float((found - wanted).abs().max()) < 1.2 * float(wanted.abs().max()) / 127


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_makes_what_it_enters_nan(bad):
    x, norm = torch.randn(2, 40, 16), make_norm(16)
    x[1, 3, 2] = bad
    layers = [make_layer(16, 16, seed) for seed in range(4)]
    found = sparse_int8_mlp_branch(x, norm, *layers[:2])
    assert found[1, 3].isnan().all()
    assert int(found.isnan().sum()) == 16
    found = sparse_int8_attention_branch(x, norm, *layers[:3], 2, 0.5, layers[3])
    assert found[1].isnan().all()
    assert found[0].isfinite().all()


def test_more_tokens_than_fit_the_working_memory():
    x, norm = torch.randn(3, 500, 8), make_norm(8)
    first, second = make_layer(4000, 8, 0, 0.9), make_layer(8, 4000, 1, 0.9)
    args = (x, norm, first, second, None)
    assert torch.equal(sparse_int8_mlp_branch(*args), mlp_by_parts(*args))


def test_more_tokens_of_three_layers_than_fit_the_working_memory():
    """Its 8 MiB hold 2,720 tokens of 3,072 numbers, which query, key and value share."""
    x, norm = torch.randn(3, 1001, 3072), make_norm(3072)
    layers = [make_layer(8, 3072, seed, 0.9) for seed in range(3)]
    args = (x, norm, *layers, 2, 0.5, make_layer(3072, 8, 3, 0.5), None)
    assert torch.equal(sparse_int8_attention_branch(*args), attention_by_parts(*args))


@pytest.mark.parametrize("value", [0.0, 1e5, -3e7, 1e-30])
def test_numbers_that_are_all_alike_have_nothing_left_of_them(value):
    norm, one = make_norm(96), (pack_int8(torch.eye(96)), None)
    x = torch.full((1, 3, 96), value)
    found = normal(x, norm)
    assert torch.equal(found, norm.bias.expand_as(found))
    assert torch.equal(sparse_int8_mlp_branch(x, norm, one, one), mlp_by_parts(x, norm, one, one, None))


@pytest.mark.parametrize("images", [0, 1])
def test_no_images_and_no_tokens_give_none(images):
    x, norm = torch.randn(images, 1 - images, 8), make_norm(8)
    layers = [make_layer(8, 8, seed) for seed in range(4)]
    assert torch.equal(sparse_int8_mlp_branch(x, norm, *layers[:2]), x)
    assert torch.equal(sparse_int8_attention_branch(x, norm, *layers[:3], 2, 0.5, layers[3]), x)


def test_several_threads_of_pytorch_and_of_python_at_once():
    x, norm, layers = torch.randn(2, 100, 48), make_norm(48), [make_layer(48, 48, seed) for seed in range(4)]
    args = (x, norm, *layers[:3], 3, 0.25, layers[3], None)
    expected = attention_by_parts(*args)
    assert all(torch.equal(found, expected) for found in in_threads(lambda: sparse_int8_attention_branch(*args)))


def refused(match, x, norm, first, second, *rest):
    with pytest.raises(RuntimeError, match=match):
        sparse_int8_mlp_branch(x, norm, first, second, *rest)


def test_what_does_not_fit_is_refused():
    x, norm, layer = torch.randn(1, 5, 8), make_norm(8), make_layer(8, 8, 0)
    refused("x must be float32", x.half(), norm, layer, layer)
    refused("x must be float32", x[0], norm, layer, layer)
    refused("without gaps", torch.randn(1, 8, 5).transpose(1, 2), norm, layer, layer)
    refused("must be 8 float32 numbers each", x, make_norm(9), layer, layer)
    refused("must be 8 float32 numbers each", x, Norm(norm.weight.double(), norm.bias, 0.0), layer, layer)
    refused("epsilon must not be negative", x, Norm(norm.weight, norm.bias, -1.0), layer, layer)
    refused("a layer of 8 x 9 must be 8 x 8", x, norm, make_layer(8, 9, 0), layer)
    refused("a layer of 8 x 9 must be 8 x 8", x, norm, layer, make_layer(8, 9, 0))
    refused("bias must be 8 floating point numbers", x, norm, layer, layer, torch.ones(7))
    with pytest.raises(RuntimeError, match="8 rows are not 3 heads of one size"):
        sparse_int8_attention_branch(x, norm, layer, layer, layer, 3, 0.5, layer)
    with pytest.raises(RuntimeError, match="scale must be positive"):
        sparse_int8_attention_branch(x, norm, layer, layer, layer, 2, 0.0, layer)
    with pytest.raises(RuntimeError, match="a layer of 6 x 8 must be 8 x 8"):
        sparse_int8_attention_branch(x, norm, layer, make_layer(6, 8, 0), layer, 2, 0.5, layer)
    with pytest.raises(RuntimeError, match="six tensors, or seven with a bias"):
        torch.ops.cap_hf.sparse_int8_mlp_branch(x, norm.weight, norm.bias, 0.0, [], [], *listed(layer), None, 0)


def test_they_are_registered_as_pytorch_asks_and_have_no_derivative():
    x, norm, layers = torch.randn(2, 5, 8), make_norm(8), [make_layer(8, 8, seed) for seed in range(4)]
    checks = ("test_schema", "test_faketensor")
    start = (x, norm.weight, norm.bias, norm.epsilon)
    first, second, third, last = (listed(layer) for layer in layers)
    torch.library.opcheck(
        torch.ops.cap_hf.sparse_int8_mlp_branch.default, (*start, *first, *second, None, 0), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.cap_hf.sparse_int8_attention_branch.default,
        (*start, *first, *second, *third, 2, 0.5, *last, torch.ones(8), 0),
        test_utils=checks,
    )
    with pytest.raises(RuntimeError, match="sparse_int8_mlp_branch is for inference only"):
        sparse_int8_mlp_branch(x.requires_grad_(), norm, *layers[:2]).sum().backward()
    with forward_ad.dual_level(), torch.no_grad():
        weight, bias = layers[0]
        dual = weight, forward_ad.make_dual(bias, bias)
        with pytest.raises(RuntimeError, match="sparse_int8_mlp_branch is for inference only"):
            sparse_int8_mlp_branch(x.detach(), norm, dual, layers[1])
