"""The sparse int8 kernel: every instruction set gives the bits of the plain product, for every shape and caller."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import has_instruction_set, make_weight
from support.int8 import INT8_INSTRUCTION_SETS, int8_reference, make_block_weight, quantize_tokens_plainly
from support.sanitizers import run_sanitized
from torch.nn import functional

from cap_hf.inference.int8_packing import MOST_COLS, pack_int8, quantize_rows
from cap_hf.inference.operators import has_int8_kernel, has_kernel, quantize_tokens, sparse_int8_linear, sparse_linear
from cap_hf.inference.packing import pack


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel(), "no C++ compiler: the kernel cannot be tested"


def expected(x, weight, bias=None):
    return int8_reference(x, *quantize_rows(weight), bias)


def supported(instruction_set):
    one = pack_int8(torch.ones(1, 1))
    return has_instruction_set(sparse_int8_linear, torch.ones(1, 1), one, None, instruction_set)


@pytest.fixture(params=INT8_INSTRUCTION_SETS)
def instruction_set(request):
    if not supported(request.param):
        pytest.skip(f"this processor lacks {request.param}")
    return request.param


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.one_of(st.integers(1, 70), st.sampled_from([197, 257])),
    rows=st.one_of(st.integers(1, 40), st.sampled_from([129, 150])),
    cols=st.one_of(st.integers(1, 70), st.sampled_from([193, 900, 1601])),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    blocks=st.booleans(),
    biased=st.booleans(),
    name=st.sampled_from([*INT8_INSTRUCTION_SETS, ""]),
)
def test_bits_are_those_of_the_plain_product(seed, tokens, rows, cols, sparsity, blocks, biased, name):
    if name and not supported(name):
        return
    weight = (make_block_weight if blocks else make_weight)(rows, cols, sparsity, seed)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed + 1))
    bias = torch.arange(rows) / 7 if biased else None
    y = sparse_int8_linear(x, pack_int8(weight), bias, name)
    assert torch.equal(y, expected(x, weight, bias))


def test_the_largest_sums_do_not_saturate(instruction_set):
    """Two products of 255 and 127 do not fit into 16 bits, and 4,000 columns of them need 27."""
    weight = torch.ones(9, 4001)
    weight[1::2] = -1
    x = torch.ones(35, 4001)
    x[::2] = -1
    y = sparse_int8_linear(x, pack_int8(weight), None, instruction_set)
    assert torch.equal(y, expected(x, weight))
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-5, atol=0)


def test_gelu_is_taken_of_what_would_be_returned(instruction_set):
    weight, x, bias = make_block_weight(30, 50, 0.5), 3 * torch.randn(40, 50), torch.randn(30)
    x[7, 1] = torch.nan
    y = sparse_int8_linear(x, pack_int8(weight), bias, instruction_set, gelu=True)
    torch.testing.assert_close(y, functional.gelu(expected(x, weight, bias)), rtol=2e-6, atol=2e-6, equal_nan=True)
    assert torch.equal(y.nan_to_num(), sparse_int8_linear(x, pack_int8(weight), bias, "portable", True).nan_to_num())


def test_halves_are_rounded_to_even(instruction_set):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49]])
    y = sparse_int8_linear(x, pack_int8(torch.eye(8)), None, instruction_set)
    assert y.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 0.0]]


def test_zeros_small_numbers_and_what_is_not_finite(instruction_set):
    weight, x, bias = make_weight(20, 37, 0.5), torch.randn(40, 37), torch.randn(20)
    weight[7] = 0
    x[0] = 0
    x[1] *= 1e-38  # below 2^-120: as if 0
    x[2] *= 1e-30
    x[3, 36] = torch.nan
    x[33, 0] = -torch.inf
    x[34] *= 1e37
    y = sparse_int8_linear(x, pack_int8(weight), bias, instruction_set)
    assert torch.equal(y[0], bias)
    assert torch.equal(y[1], bias)
    assert y[[3, 33]].isnan().all()
    rest = [token for token in range(40) if token not in (3, 33)]
    assert y[rest].isfinite().all()
    assert torch.equal(y[rest], expected(x, weight, bias)[rest])


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_leading_dimensions_are_kept(shape):
    weight, x = make_weight(7, 5, 0.5), torch.randn(shape)
    y = sparse_int8_linear(x, pack_int8(weight))
    assert y.shape == (*shape[:-1], 7)
    if x.numel():
        assert torch.equal(y, expected(x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_in_and_out(dtype):
    weight, x, bias = make_weight(20, 30, 0.5), torch.randn(9, 30).to(dtype), torch.randn(20).to(dtype)
    y = sparse_int8_linear(x, pack_int8(weight), bias)
    assert y.dtype == dtype
    assert torch.equal(y, expected(x, weight, bias).to(dtype))


def test_inputs_that_are_not_contiguous():
    weight, x = make_weight(20, 30, 0.5), torch.randn(30, 9, 2)
    for view in (x.permute(1, 2, 0), x[..., 0].t(), x[:, ::2, 1].t(), torch.randn(1, 30).expand(5, 30)):
        assert torch.equal(sparse_int8_linear(view, pack_int8(weight)), expected(view, weight))


@pytest.mark.parametrize("x", [torch.randn(2, 4), torch.tensor(1.0), torch.randn(2, 5, dtype=torch.float64)])
def test_inputs_that_do_not_fit_are_refused(x):
    with pytest.raises(RuntimeError, match="sparse_int8_linear: x "):
        sparse_int8_linear(x, pack_int8(make_weight(3, 5, 0.5)))


def test_a_packed_weight_whose_parts_do_not_fit_is_refused():
    packed = pack_int8(make_weight(30, 50, 0.5))
    parts = {name: getattr(packed, name)[1:] for name in ("starts", "order", "scales", "corrections")}
    for wrong in ({"rows": 300}, {"cols": 5000}, *({name: part} for name, part in parts.items())):
        with pytest.raises(RuntimeError, match="do not fit|last size"):
            sparse_int8_linear(torch.randn(2, 50), type(packed)(**{**vars(packed), **wrong}))
    with pytest.raises(RuntimeError, match="longer than"):
        sparse_int8_linear(
            torch.zeros(1, MOST_COLS + 1), type(packed)(**{**vars(packed), "rows": 30, "cols": MOST_COLS + 1})
        )


def test_more_tokens_than_fit_the_working_memory():
    # A tile of 16,384 columns takes 2 ** 17 words, so that 15 tiles (480 tokens) are computed at a time.
    weight, x = make_block_weight(5, 16384, 0.95), torch.randn(520, 16384)
    packed = pack_int8(weight)
    y = sparse_int8_linear(x, packed)
    assert torch.equal(y[490:], sparse_int8_linear(x[490:], packed))
    assert torch.equal(y[:40], expected(x[:40], weight))


def test_one_thread_and_two_give_the_same_bits():
    packed, x, threads = pack_int8(make_block_weight(300, 400, 0.8)), torch.randn(197, 400), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sparse_int8_linear(x, packed)
        torch.set_num_threads(2)
        for _ in range(20):
            assert torch.equal(sparse_int8_linear(x, packed), alone)
    finally:
        torch.set_num_threads(threads)


def test_several_python_threads_at_once():
    packed = pack_int8(make_block_weight(150, 200, 0.8))
    inputs = [torch.randn(40 + 9 * index, 200) for index in range(4)]
    right = [sparse_int8_linear(x, packed) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(20):
            if not torch.equal(sparse_int8_linear(inputs[index], packed), right[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_environment_forces_an_instruction_set_on_both_kernels(monkeypatch):
    assert has_kernel()
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    monkeypatch.setenv("CAP_HF_INSTRUCTION_SET", "sse9")
    with pytest.raises(RuntimeError, match="no instruction set sse9"):
        sparse_int8_linear(x, pack_int8(weight))
    with pytest.raises(RuntimeError, match="no instruction set sse9"):
        sparse_linear(x, pack(weight))
    assert torch.equal(sparse_int8_linear(x, pack_int8(weight), None, "portable"), expected(x, weight))
    for name in ("portable", "avx512_vnni", "avx512", "avx_vnni", "avx2"):
        if supported(name):
            monkeypatch.setenv("CAP_HF_INSTRUCTION_SET", name)
            assert torch.equal(sparse_int8_linear(x, pack_int8(weight)), expected(x, weight))
            torch.testing.assert_close(sparse_linear(x, pack(weight)), x @ weight.t())


def test_tokens_are_quantised_for_a_dense_product_as_for_the_sparse_one():
    x = torch.randn(3, 21, 45)
    x[0, 0], x[1, 1, 1] = 0, torch.nan
    q, scales = quantize_tokens(x)
    right, right_scales = quantize_tokens_plainly(x)
    finite = x.isfinite().all(-1)
    assert torch.equal(q[finite].int() - 128, torch.from_numpy(right)[finite])
    torch.testing.assert_close(scales, torch.from_numpy(right_scales), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="quantize_tokens"):
        quantize_tokens(torch.tensor(1.0))


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    assert "agree" in run_sanitized("sparse_int8_linear_main.cpp", sanitizers, tmp_path)
