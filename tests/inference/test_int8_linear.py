"""int8 layers by themselves and in a model: what they compute, hold, save, load and copy."""

import copy
import io

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.inference import logits, make_vit, pixels, sparse_layers
from support.int8 import int8_reference, make_block_weight
from torch import nn

from cap_hf import CAPError, SparseAutoModel, optimize_for_inference
from cap_hf.inference import optimize
from cap_hf.inference.int8_linear import DenseInt8Linear, SparseInt8Linear, fake_dense_int8_linear, has_dense_int8
from cap_hf.inference.int8_packing import quantize_rows
from cap_hf.inference.linear import resident_bytes
from cap_hf.inference.operators import has_int8_kernel


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel(), "no C++ compiler: the kernel cannot be tested"


@pytest.fixture(params=[SparseInt8Linear, DenseInt8Linear])
def kind(request):
    if request.param is DenseInt8Linear and not has_dense_int8():
        pytest.skip("PyTorch's dense int8 product needs x86 with VNNI")
    return request.param


def make_linear(bias=True, share=0.75, seed=0):
    linear = nn.Linear(50, 30, bias=bias).eval()
    with torch.no_grad():
        linear.weight.copy_(make_block_weight(30, 50, share, seed))
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 31, 33])
def test_outputs_are_those_of_the_int8_product(kind, bias, tokens):
    linear, x = make_linear(bias), torch.randn(2, tokens, 50)
    layer = kind(linear)
    with torch.inference_mode():
        y = layer(x)
        torch.testing.assert_close(
            y, int8_reference(x, *quantize_rows(linear.weight.detach()), linear.bias), rtol=1e-6, atol=1e-6
        )
        assert float((y - linear(x)).norm() / linear(x).norm()) < 0.05
    assert repr(layer) == f"{kind.__name__}(in_features=50, out_features=30, bias={bias})"


def test_a_token_that_is_not_finite_is_nan_and_others_are_not(kind):
    x = torch.randn(2, 20, 50)
    x[0, 3, 7], x[1, 4, 9], x[1, 5] = torch.nan, torch.inf, 0
    layer = kind(make_linear())
    y = layer(x)
    assert y.isnan().all(-1).nonzero().tolist() == [[0, 3], [1, 4]]
    assert int(y.isnan().any(-1).sum()) == 2
    assert torch.equal(y[1, 5], layer.bias)


def test_state_dict_is_the_rounded_dense_weight_and_loads(kind):
    linear, other = make_linear(), make_linear(share=0.5, seed=1)
    layer = kind(linear)
    quantized, scales = quantize_rows(linear.weight.detach())
    found = layer.state_dict()
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], quantized * scales[:, None])
    assert torch.equal(found["weight"] == 0, (quantized == 0))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer.weight, other.weight.detach(), rtol=0, atol=0.02)
    assert layer.weight_bytes() < linear.weight.numel() * 4


def test_its_own_state_dict_and_weights_in_any_order_of_memory_change_nothing(kind):
    linear, x = make_linear(), torch.randn(5, 50)
    layer = kind(linear)
    expected = layer(x)
    layer.load_state_dict(layer.state_dict())
    # A scale that has been a weight's largest once may differ in its last digit.
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    assert not linear.weight.is_contiguous()
    assert torch.equal(kind(linear)(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_pass_is_an_error(kind, compiled):
    layer, x = kind(make_linear()), torch.randn(5, 50, requires_grad=True)
    model = torch.compile(layer, backend="aot_eager") if compiled else layer
    with pytest.raises((RuntimeError, NotImplementedError)):
        (model(x).sum() + x.sum()).backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(50,), (0, 50), (2, 0, 50), (1, 2, 3, 50)])
def test_leading_dimensions_are_kept(kind, shape, bias):
    layer, x = kind(make_linear(bias)), torch.randn(shape)
    assert torch.equal(layer(x), layer(x.reshape(-1, 50)).reshape(*shape[:-1], 30))


def test_a_wrong_number_of_inputs_is_told(kind):
    with pytest.raises(RuntimeError, match="last size must be 50"):
        kind(make_linear())(torch.randn(4, 49))


def test_all_of_its_weights_are_counted(kind):
    layer = kind(make_linear(share=0.0))
    assert resident_bytes(layer) >= layer.weight_bytes() >= 30 * 50


def test_copies_and_pickles_compute_the_same(kind):
    layer, x = kind(make_linear()), torch.randn(5, 50)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), layer(x))


def test_half_precision_goes_in_and_out(kind):
    layer, x = kind(make_linear()).to(torch.bfloat16), torch.randn(4, 50, dtype=torch.bfloat16)
    assert (layer.weight.dtype, layer.scales.dtype) == (torch.bfloat16, torch.float32)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), make_linear()(x.float()), rtol=0.1, atol=2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_the_scales_alone(kind, dtype):
    linear = make_linear()
    linear.weight.data.mul_(1e-6)
    layer = kind(linear)
    before = layer.scales.clone()
    assert torch.equal(layer.to(dtype).float().scales, before)


def test_it_is_exported(kind):
    layer, x = kind(make_linear()), torch.randn(5, 50)
    with torch.inference_mode():
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_it_is_compiled(kind):
    layer, x = kind(make_linear()), torch.randn(5, 50)
    with torch.inference_mode():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_shape_and_dtype_are_known_without_computing():
    x = torch.empty(2, 9, 30, dtype=torch.bfloat16, device="meta")
    y = fake_dense_int8_linear(x, torch.empty(30, 20), torch.empty(20), torch.empty(20), None)
    assert (y.shape, y.dtype) == ((2, 9, 20), torch.bfloat16)


def test_another_device_is_one_line(kind):
    with pytest.raises(CAPError, match="got an input on meta"):
        kind(make_linear())(torch.empty(2, 50, device="meta"))


def test_a_model_in_int8_gives_about_the_same_logits_and_its_head_stays():
    model = make_vit()
    x, expected = pixels(model), logits(model, pixels(model))
    optimize_for_inference(model, "kernel", dtype="int8")
    assert len(sparse_layers(model)) == 12
    assert {type(layer) for layer in sparse_layers(model)} == {SparseInt8Linear}
    assert type(model.classifier) is nn.Linear
    found = logits(model, x)
    assert not torch.equal(found, expected)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_auto_takes_what_is_measured_to_be_the_fastest(monkeypatch):
    asked = []

    def fastest_kind(linear, tokens):
        asked.append(tokens)
        return SparseInt8Linear if linear.in_features == 768 else None

    monkeypatch.setattr(optimize, "fastest_kind", fastest_kind)
    model = make_vit()
    optimize_for_inference(model, dtype="int8")
    assert asked == [65] * 12
    assert [type(layer) for layer in sparse_layers(model)] == [SparseInt8Linear] * 2


def test_a_checkpoint_loads_straight_into_int8(tmp_path):
    make_checkpoint(tmp_path / "pruned", 0.9)
    model = SparseAutoModel.from_pretrained(str(tmp_path / "pruned"), backend="kernel", runtime="int8")
    assert {type(layer) for layer in sparse_layers(model)} == {SparseInt8Linear}


def test_what_cannot_be_int8_is_one_line(monkeypatch):
    model = make_vit()
    with pytest.raises(CAPError, match="dtype 'int4' is none of float32, int8"):
        optimize_for_inference(model, dtype="int4")
    with pytest.raises(CAPError, match="'csr' knows no int8"):
        optimize_for_inference(model, "csr", dtype="int8")
    monkeypatch.setattr(optimize, "has_int8_kernel", lambda: False)
    with pytest.raises(CAPError, match="dtype='int8' needs a C\\+\\+ compiler"):
        optimize_for_inference(model, dtype="int8")
    assert not sparse_layers(model)


def test_a_weight_that_cannot_be_quantised_stays_dense(monkeypatch):
    monkeypatch.setattr(optimize, "is_quantizable", lambda weight: weight.shape[1] < 768)
    model = optimize_for_inference(make_vit(), "kernel", dtype="int8")
    assert {type(layer.mlp.fc2) for layer in model.vit.layers} == {nn.Linear}
    assert len(sparse_layers(model)) == 10


def test_what_no_layer_can_do_is_one_line_before_anything_is_loaded(monkeypatch):
    with pytest.raises(CAPError, match="runtime 'int4' is none of float32, int8"):
        SparseAutoModel.from_pretrained("no/such-model", runtime="int4")
    monkeypatch.setattr(optimize, "is_quantizable", lambda weight: False)
    with pytest.raises(CAPError, match="no weight can be int8"):
        optimize_for_inference(make_vit(), "kernel", dtype="int8")
    monkeypatch.setenv("CAP_HF_DISABLE_EXTENSIONS", "1")
    with pytest.raises(CAPError, match="which CAP_HF_DISABLE_EXTENSIONS leaves out"):
        optimize_for_inference(make_vit(), dtype="int8")
