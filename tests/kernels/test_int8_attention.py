"""Attention in int8: every instruction set gives the bits of the plain steps, and is near exact attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import has_instruction_set
from support.int8 import INT8_INSTRUCTION_SETS, attention_reference
from support.sanitizers import run_sanitized
from torch.nn import functional

from cap_hf.inference.operators import has_int8_kernel, int8_attention


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel(), "no C++ compiler: the kernel cannot be tested"


def make_heads(images, heads, queries, keys, cols, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(images, heads, queries, cols, generator=generator) * size
    k, v = (torch.randn(images, heads, keys, cols, generator=generator) * size for _ in range(2))
    return q, k + 3 * torch.randn(cols, generator=generator), v


def exact(q, k, v, scale):
    return functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale).transpose(1, 2)


def supported(instruction_set):
    return has_instruction_set(int8_attention, *make_heads(1, 1, 1, 1, 1), 1.0, instruction_set)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.one_of(st.integers(1, 70), st.sampled_from([197])),
    keys=st.one_of(st.integers(1, 70), st.sampled_from([197, 1030])),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 128])),
    size=st.sampled_from([0.1, 1.0, 5.0]),
    name=st.sampled_from([*INT8_INSTRUCTION_SETS, ""]),
)
def test_bits_are_those_of_the_plain_steps(seed, images, heads, queries, keys, cols, size, name):
    if name and not supported(name):
        return
    heads_of = make_heads(images, heads, queries, keys, cols, seed, size)
    assert torch.equal(int8_attention(*heads_of, 0.3, name), attention_reference(*heads_of, 0.3))


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_it_is_near_exact_attention(size):
    q, k, v = make_heads(2, 3, 65, 65, 64, size=size)
    y, expected = int8_attention(q, k, v, 0.125), exact(q, k, v, 0.125)
    assert float((y - expected).norm() / expected.norm()) < 0.02


def test_many_small_weights_are_not_lost():
    """A thousand keys have a thousandth each of the largest weight: in eight bits they would have none."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1001, 4), torch.zeros(1, 1, 1001, 1).expand(1, 1, 1001, 4)
    q[..., 0], k[..., 0, 0] = 1, 1
    v = v.clone()
    v[..., 1:, :] = 1
    scale = 6.9  # e^6.9 is about 1,000: half of the weight is on the first key, half on the others
    assert float((int8_attention(q, k, v, scale) - exact(q, k, v, scale)).abs().max()) < 0.01


def test_what_is_not_finite_reaches_what_it_enters_and_no_more():
    q, k, v = make_heads(1, 4, 40, 35, 16)
    expected = int8_attention(q, k, v, 0.25)
    q[0, 0, 3, 5], k[0, 1, 34, 0], v[0, 2, 7, 9] = torch.nan, torch.inf, torch.nan
    y = int8_attention(q, k, v, 0.25)
    assert y[0, 3, 0].isnan().all()
    assert y[0, :, 1].isnan().all()
    assert y[0, :, 2, 9].isnan().all()
    wrong = y.isnan()
    assert int(wrong.sum()) == 16 + 40 * 16 + 40
    assert torch.equal(y[~wrong], expected[~wrong])


def test_zeros_and_equal_keys_give_the_mean():
    q, k, v = make_heads(1, 2, 5, 30, 8)
    for queries, keys in ((torch.zeros_like(q), k), (q, k[:, :, :1].expand_as(k))):
        torch.testing.assert_close(
            int8_attention(queries, keys, v, 1.0), v.mean(2)[:, None].expand(1, 5, 2, 8), rtol=0, atol=0.02
        )


def test_tensors_as_transformers_has_them_and_others_that_are_not_contiguous():
    q, k, v = (torch.randn(2, 21, 3, 8).transpose(1, 2) for _ in range(3))
    expected = int8_attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.5)
    assert torch.equal(int8_attention(q, k, v, 0.5), expected)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    assert q.stride(3) != 1
    assert torch.equal(int8_attention(q, k, v, 0.5), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_out(dtype):
    q, k, v = (x.to(dtype) for x in make_heads(1, 2, 9, 11, 16))
    y = int8_attention(q, k, v, 0.25)
    assert y.dtype == dtype
    assert torch.equal(y, attention_reference(q, k, v, 0.25).to(dtype))


def test_threads_change_nothing():
    # One head and four threads: the queries are split.
    threads, heads = torch.get_num_threads(), make_heads(1, 1, 150, 90, 32)
    try:
        torch.set_num_threads(1)
        alone = int8_attention(*heads, 0.2)
        torch.set_num_threads(4)
        assert torch.equal(int8_attention(*heads, 0.2), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, attention_reference(*heads, 0.2))


def test_no_queries_and_no_images():
    q, k, v = make_heads(1, 2, 3, 4, 8)
    assert int8_attention(q[:, :, :0], k, v, 1.0).shape == (1, 0, 2, 8)
    assert int8_attention(q[:0], k[:0], v[:0], 1.0).shape == (0, 3, 2, 8)


def test_what_does_not_fit_is_refused():
    q, k, v = make_heads(1, 2, 3, 4, 8)
    for wrong in ((q[0], k, v), (q, k[:, :1], v), (q, k, v[:, :, :2]), (q[..., :4], k, v)):
        with pytest.raises(RuntimeError, match="int8_attention"):
            int8_attention(*wrong, 1.0)
    with pytest.raises(RuntimeError, match="scale must be positive, not -1"):
        int8_attention(q, k, v, -1.0)
    with pytest.raises(RuntimeError, match="k has shape"):
        int8_attention(q, k[:, :, :0], v[:, :, :0], 1.0)
    many = torch.zeros(1, 1, 1, 8).expand(1, 1, 40000, 8)
    with pytest.raises(RuntimeError, match="k has shape"):
        int8_attention(q[:, :1], many, many, 1.0)
    with pytest.raises(RuntimeError, match="must be float32"):
        int8_attention(q.double(), k.double(), v.double(), 1.0)


def test_a_backward_pass_is_an_error():
    q, k, v = make_heads(1, 1, 3, 4, 8)
    with pytest.raises(RuntimeError, match="inference only"):
        int8_attention(q.requires_grad_(), k, v, 1.0).sum().backward()


@pytest.mark.parametrize("sanitizers", ["address,undefined"])
def test_nothing_reads_or_writes_outside(sanitizers, tmp_path):
    assert "instruction sets agree" in run_sanitized("int8_attention_main.cpp", sanitizers, tmp_path)
