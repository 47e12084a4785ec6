"""The CPU kernel: equal to the dense product for every shape, instruction set and caller."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inference import has_instruction_set, make_weight
from support.sanitizers import run_sanitized
from torch.nn import functional

from cap_hf.inference.operators import has_kernel, sparse_linear
from cap_hf.inference.packing import pack

ROOT = Path(__file__).parents[2]
INSTRUCTION_SETS = ["portable", "avx2", "avx512"]


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_kernel(), "no C++ compiler: the kernel cannot be tested"


def reference(x, weight, bias):
    """In float64, one number at a time as far as PyTorch is concerned."""
    y = (x.double()[..., None, :] * weight.double()).sum(-1)
    return (y if bias is None else y + bias.double()).float()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.one_of(st.integers(1, 70), st.sampled_from([197, 257])),
    rows=st.one_of(st.integers(1, 40), st.sampled_from([129, 150])),
    cols=st.one_of(st.integers(1, 40), st.sampled_from([193, 400])),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    biased=st.booleans(),
    instruction_set=st.sampled_from([*INSTRUCTION_SETS, ""]),
)
def test_product_equals_the_dense_one(seed, tokens, rows, cols, sparsity, biased, instruction_set):
    if instruction_set and not supported(instruction_set):
        return
    weight = make_weight(rows, cols, sparsity, seed)
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed + 1))
    bias = torch.arange(rows) / 7 if biased else None
    y = sparse_linear(x, pack(weight), bias, instruction_set)
    torch.testing.assert_close(y, reference(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("tokens", [5, 40])
def test_gelu_is_taken_of_what_would_be_returned(instruction_set, tokens):
    if not supported(instruction_set):
        pytest.skip(f"this processor lacks {instruction_set}")
    x, packed, bias = 10 * torch.linspace(-1, 1, tokens)[:, None], pack(torch.ones(9, 1)), torch.arange(9) / 9
    y = sparse_linear(x, packed, bias, instruction_set, gelu=True)
    expected = functional.gelu(sparse_linear(x, packed, bias, instruction_set).double()).float()
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


def supported(instruction_set):
    return has_instruction_set(sparse_linear, torch.ones(1, 1), pack(torch.ones(1, 1)), None, instruction_set)


def test_portable_code_runs_everywhere_and_other_names_are_refused():
    assert supported("portable")
    assert not supported("sse9")


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_leading_dimensions_are_kept(shape):
    weight, x = make_weight(7, 5, 0.5), torch.randn(shape)
    y = sparse_linear(x, pack(weight))
    assert y.shape == (*shape[:-1], 7)
    torch.testing.assert_close(y, x @ weight.t())


def test_rows_and_layers_without_weights():
    weight = make_weight(70, 300, 0.5)
    weight[::3] = 0
    weight[:, 200:] = 0
    x, bias = torch.randn(33, 300), torch.randn(70)
    torch.testing.assert_close(sparse_linear(x, pack(weight), bias), reference(x, weight, bias), rtol=1e-4, atol=1e-4)
    empty = pack(torch.zeros(70, 300))
    assert empty.values.numel() == 0
    assert torch.equal(sparse_linear(x, empty, bias), bias.expand(33, -1))


def test_rows_of_very_different_lengths():
    weight = torch.zeros(40, 500)
    for row in range(40):
        weight[row, : (row * 37) % 501] = row + 1.0
    x = torch.randn(50, 500)
    torch.testing.assert_close(sparse_linear(x, pack(weight)), reference(x, weight, None), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    weight, x, bias = make_weight(20, 30, 0.5), torch.randn(9, 30).to(dtype), torch.randn(20).to(dtype)
    y = sparse_linear(x, pack(weight), bias)
    assert y.dtype == dtype
    torch.testing.assert_close(y, reference(x, weight, bias).to(dtype), rtol=1e-2, atol=1e-2)


def test_inputs_that_are_not_contiguous():
    weight, x = make_weight(20, 30, 0.5), torch.randn(30, 9, 2)
    for view in (x.permute(1, 2, 0), x[..., 0].t(), x[:, ::2, 1].t(), torch.randn(1, 30).expand(5, 30)):
        torch.testing.assert_close(sparse_linear(view, pack(weight)), view @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("x", [torch.randn(2, 4), torch.tensor(1.0), torch.randn(2, 5, dtype=torch.float64)])
def test_inputs_that_do_not_fit_are_refused(x):
    with pytest.raises(RuntimeError, match="sparse_linear: x "):
        sparse_linear(x, pack(make_weight(3, 5, 0.5)))


def test_a_packed_weight_whose_parts_do_not_fit_is_refused():
    packed = pack(make_weight(30, 50, 0.5))
    for wrong in ({"rows": 300}, {"cols": 5000}, {"starts": packed.starts[1:]}, {"order": packed.order[1:]}):
        with pytest.raises(RuntimeError, match="do not fit|last size"):
            sparse_linear(torch.randn(2, 50), type(packed)(**{**vars(packed), **wrong}))


def test_numbers_that_are_not_finite_reach_their_own_token_only():
    weight, x = make_weight(20, 40, 0.5), torch.randn(40, 40)
    x[3] = torch.inf
    y = sparse_linear(x, pack(weight))
    others = torch.arange(40) != 3
    torch.testing.assert_close(y[others], reference(x[others], weight, None), rtol=1e-4, atol=1e-4)
    assert not y[3].isfinite().any()


def test_more_tokens_than_fit_the_working_memory():
    # A tile of 4096 columns takes 2 ** 17 floats, so that 16 tiles (512 tokens) are computed at a time.
    weight, x, bias = make_weight(5, 4096, 0.9), torch.randn(1100, 4096), torch.randn(5)
    y = sparse_linear(x, pack(weight), bias)
    torch.testing.assert_close(y, x @ weight.t() + bias, rtol=1e-3, atol=1e-3)
    assert torch.equal(sparse_linear(x[:3], pack(weight), bias), y[:3])


def test_one_thread_and_two_give_the_same_bits():
    packed, x, threads = pack(make_weight(300, 400, 0.8)), torch.randn(197, 400), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sparse_linear(x, packed)
        torch.set_num_threads(2)
        for _ in range(20):
            assert torch.equal(sparse_linear(x, packed), alone)
    finally:
        torch.set_num_threads(threads)


def test_several_python_threads_at_once():
    packed = pack(make_weight(150, 200, 0.8))
    inputs = [torch.randn(40 + 9 * index, 200) for index in range(6)]
    expected = [sparse_linear(x, packed) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(30):
            if not torch.equal(sparse_linear(inputs[index], packed), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FORKING = """
import os, torch
from cap_hf.inference.operators import has_kernel, sparse_linear
from cap_hf.inference.packing import pack
assert has_kernel()
packed, x = pack(torch.eye(40)), torch.randn(70, 40)
assert torch.equal(sparse_linear(x, packed), x)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a DataLoader's worker does: threads do not survive a fork
    os._exit(0 if torch.equal(sparse_linear(x, packed), x) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(sparse_linear(x, packed), x)
"""


def test_works_in_a_forked_process():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FORKING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    assert "agree" in run_sanitized("sparse_linear_main.cpp", sanitizers, tmp_path)
