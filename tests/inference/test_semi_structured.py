"""2:4: what a GPU's tensor cores take is found, and compressed as PyTorch compresses it. The product needs a GPU."""

import copy

import pytest
import torch
from support.gpu import needs_gpu
from support.models import build
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from cap_hf import CAPCompressor, CAPConfig, CAPError, find_targets, optimize_for_inference
from cap_hf.inference import optimize, semi_structured
from cap_hf.inference.example import make_example
from cap_hf.inference.semi_structured import check_device, is_semi_structured, save_dense, to_semi_structured


def make_model():
    model = build("ViT", hidden_size=64, intermediate_size=128)
    CAPCompressor(model, CAPConfig(method="magnitude", allocation="2:4"), disable_tqdm=True).prune(0.5)
    return model.to(torch.bfloat16).eval()


def compress_on_cpu(weight):
    """What `to_sparse_semi_structured` does on a GPU without cuSPARSELt, by PyTorch's own conversion."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    return SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)


def test_weights_pruned_to_2_of_4_qualify():
    model = make_model()
    linears = optimize.find_sparse_linears(model)
    assert len(linears) == len(find_targets(model)) == 12
    assert all(is_semi_structured(linear.weight) for linear in linears.values())


def test_other_weights_do_not():
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight.view(-1, 4)[:, 1:3] = 1
    assert is_semi_structured(weight)
    assert not is_semi_structured(weight.float())
    assert not is_semi_structured(weight[:31])
    assert not is_semi_structured(weight[:, :36])
    weight[5, 7] = 1
    assert not is_semi_structured(weight)
    # Two of four along a column are not two of four along a row.
    columns = torch.zeros(64, 64, dtype=torch.float16)
    columns[::2] = 1
    assert not is_semi_structured(columns)
    assert is_semi_structured(columns.t().contiguous())


def test_compressed_weights_are_half_as_large_and_save_as_dense(monkeypatch):
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", compress_on_cpu)
    monkeypatch.setattr(semi_structured, "check_device", lambda device: None)
    model = make_model()
    dense = copy.deepcopy(model.state_dict())
    linears = optimize.find_sparse_linears(model)
    optimize_for_inference(model, "semi_structured")
    for name, linear in linears.items():
        assert isinstance(linear.weight, SparseSemiStructuredTensorCUTLASS)
        assert linear.weight.packed.numel() * 2 == dense[f"{name}.weight"].numel()
        assert not linear.weight.requires_grad
    found = model.state_dict()
    assert found.keys() == dense.keys()
    for name, tensor in dense.items():
        assert type(found[name]) is torch.Tensor, name
        assert torch.equal(found[name], tensor), name


def test_what_is_faster_is_asked_with_the_tokens_of_each_layer():
    """Whatever is asked: this is the choice of `auto` on CPUs and on GPUs."""
    model = make_model()
    linears, example = optimize.find_sparse_linears(model), make_example(model)
    found = optimize.faster_layers(
        model, linears, lambda linear, tokens: linear.out_features == 128 and tokens == 5, example
    )
    assert list(found.values()) == [layer.mlp.fc1 for layer in model.vit.layers]
    unreached = linears | {"nowhere": nn.Linear(4, 128)}
    assert optimize.faster_layers(model, unreached, lambda linear, tokens: True, example) == linears


def test_without_a_gpu_it_is_one_line():
    linear = nn.Linear(64, 32)
    with pytest.raises(CAPError, match="NVIDIA GPUs and the model is on cpu"):
        to_semi_structured(linear)
    with pytest.raises(CAPError, match="NVIDIA"):
        check_device(torch.device("mps"))
    with pytest.raises(CAPError, match="NVIDIA"):
        optimize_for_inference(make_model(), "semi_structured")


def test_state_dict_hook_leaves_other_entries():
    linear = nn.Linear(4, 4)
    state = {"x.weight": None, "x.bias": linear.bias}
    linear.weight = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
    save_dense(linear, state, "x.", {})
    assert torch.equal(state["x.weight"], torch.eye(4))
    assert state["x.bias"] is linear.bias


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_product_on_a_gpu_equals_the_dense_one(device):
    model = make_model().to(device)
    x = torch.randn(4, 3, 8, 8, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(x).logits
        optimize_for_inference(model, "semi_structured")
        torch.testing.assert_close(model(x).logits, expected, rtol=5e-2, atol=5e-2)
