"""The sparse layers by themselves: they compute, hold, save and load as the Linear they stand for."""

import copy

import pytest
import torch
from support.inference import make_weight
from torch import nn

from cap_hf import CAPError
from cap_hf.inference.linear import CSRLinear, SparseLinear, SparseWeightLinear, carry_hooks
from cap_hf.inference.operators import has_kernel

KINDS = [SparseLinear, CSRLinear]


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_kernel(), "no C++ compiler: the kernel cannot be tested"


def make_linear(bias=True, sparsity=0.8):
    linear = nn.Linear(50, 30, bias=bias).eval()
    with torch.no_grad():
        linear.weight.copy_(make_weight(30, 50, sparsity))
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_weight_are_those_of_the_linear(kind, bias):
    linear, x = make_linear(bias), torch.randn(2, 3, 50)
    sparse = kind(linear)
    assert torch.equal(sparse.weight, linear.weight)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), linear(x), rtol=1e-5, atol=1e-5)
    assert repr(sparse) == f"{kind.__name__}(in_features=50, out_features=30, bias={bias})"
    assert not sparse.training


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_the_dense_one_and_loads(kind):
    linear, other = make_linear(), make_linear(sparsity=0.5)
    sparse = kind(linear)
    found = sparse.state_dict()
    assert list(found) == ["weight", "bias"]
    assert all(torch.equal(found[name], value) for name, value in linear.state_dict().items())
    sparse.load_state_dict(other.state_dict())
    assert torch.equal(sparse.weight, other.weight)
    with pytest.raises(RuntimeError, match=r"weight has shape \(3, 3\), not \(30, 50\)"):
        sparse.load_state_dict({"weight": torch.zeros(3, 3), "bias": other.bias})
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse.load_state_dict({"bias": other.bias})


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_goes_in_and_out(kind):
    linear, x = make_linear(), torch.randn(4, 50, dtype=torch.bfloat16)
    sparse = kind(copy.deepcopy(linear)).to(torch.bfloat16)
    assert (sparse.weight.dtype, sparse.values.dtype) == (torch.bfloat16, torch.float32)
    with torch.inference_mode():
        y = sparse(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), linear(x.float()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_what_is_not_zero(kind):
    sparse, fuller = kind(make_linear(sparsity=0.95)), kind(make_linear(sparsity=0.2))
    assert sparse.weight_bytes() == sum(buffer.numel() * buffer.element_size() for buffer in sparse.buffers())
    assert sparse.weight_bytes() < fuller.weight_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_another_device_is_one_line(kind):
    with pytest.raises(CAPError, match="got an input on meta"):
        kind(make_linear())(torch.empty(2, 50, device="meta"))


def test_hooks_go_along_and_can_be_removed():
    old, seen = make_linear(), []
    handle = old.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    new = CSRLinear(old)
    carry_hooks(old, new)
    new(torch.randn(1, 50))
    assert seen == [CSRLinear]
    handle.remove()
    new(torch.randn(1, 50))
    assert len(seen) == 1


def test_a_kind_gives_three_things():
    with pytest.raises(NotImplementedError):
        SparseWeightLinear(make_linear())
    with pytest.raises(NotImplementedError):
        SparseWeightLinear.dense_weight(object())
