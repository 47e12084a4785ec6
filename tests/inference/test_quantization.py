"""int8 keeps the zeros, the accuracy and the checkpoint."""

import copy

import pytest
import torch
from support.inference import logits, make_vit, pixels
from support.models import build
from torch import nn
from transformers import AutoModelForImageClassification

from cap_hf import CAPError, export_onnx, find_targets, optimize_for_inference
from cap_hf.inference.benchmark import benchmark
from cap_hf.inference.quantization import quantize_int8


def reference(model):
    """Return a model with what int8 weights with one symmetric scale per row are, computed plainly."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for target in find_targets(model):
            scale = (target.weight.abs().amax(dim=1, keepdim=True) / 127.5).clamp(min=1e-12)
            target.weight.copy_((target.weight / scale).round().clamp(-128, 127) * scale)
    return model


def zeros(model):
    """Where the weights of every target are 0, also those of an int8 model."""
    weights = {target.name: target.weight.detach() for target in find_targets(model)}
    return {
        name: (weight.dequantize() if type(weight) is not torch.Tensor else weight) == 0
        for name, weight in weights.items()
    }


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao")


@pytest.mark.parametrize("activations", [False, True])
def test_zeros_stay_and_logits_are_near(torchao, activations):
    model = make_vit(0.75)
    quantized = quantize_int8(model, activations)
    x = pixels(model, 16)
    expected = logits(model, x)
    before, after = zeros(model), zeros(quantized)
    assert before.keys() == after.keys()
    assert all(after[name][before[name]].all() for name in before)
    assert all(type(target.weight.detach()) is not torch.Tensor for target in find_targets(quantized))
    difference = (logits(quantized, x) - expected).abs().max() / expected.abs().max()
    assert 0 < difference < 0.05
    assert type(quantized.classifier.weight) is nn.Parameter
    assert torch.equal(quantized.classifier.weight, model.classifier.weight)


def test_weights_are_those_of_one_scale_per_row(torchao):
    model = make_vit(0.75)
    x = pixels(model)
    torch.testing.assert_close(logits(quantize_int8(model), x), logits(reference(model), x), rtol=1e-2, atol=2e-3)


def test_a_quantised_checkpoint_loads_again(torchao, tmp_path):
    model = make_vit(0.75)
    quantized = quantize_int8(model)
    quantized.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    x = pixels(model)
    torch.testing.assert_close(logits(again, x), logits(quantized, x))
    before, after = zeros(quantized), zeros(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "model.safetensors").stat().st_size < 0.4 * 4 * sum(p.numel() for p in model.parameters())


def test_what_cannot_be_quantised_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CAPError, match=r"pip install 'cap_hf\[quantization\]'"):
        quantize_int8(make_vit())
    monkeypatch.undo()
    with pytest.raises(CAPError, match="load it anew"):
        quantize_int8(optimize_for_inference(make_vit(), "kernel"))
    with pytest.raises(CAPError, match="has no Linear layer to quantise: its targets are convolutions"):
        quantize_int8(build("ResNet"))


def test_what_is_quantised_goes_where_it_can_and_is_named_elsewhere(torchao, tmp_path):
    quantized = quantize_int8(make_vit())
    for call in (
        optimize_for_inference,
        quantize_int8,
        lambda model: export_onnx(model, tmp_path / "onnx"),
        lambda model: benchmark(model, ["sparse"], [1], [1]),
    ):
        with pytest.raises(CAPError, match=r"the weights of ViTForImageClassification are quantised \(torchao\): "):
            call(quantized)
    assert not (tmp_path / "onnx").exists()
