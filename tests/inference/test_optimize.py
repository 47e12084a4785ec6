"""Optimised models: the same outputs, the same outside, less memory, and one clear line where they cannot run."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.backbones import tiny_dinov2
from support.checkpoints import make_checkpoint, make_processor
from support.families import CLASSIFIERS
from support.inference import logits, make_vit, pixels, prune, sparse_layers
from support.models import ARCHITECTURES, build, random_batches
from torch import nn
from transformers import AutoModelForImageClassification, BitImageProcessorPil, pipeline

import cap_hf
from cap_hf import (
    CAPError,
    SparseAutoModel,
    SparseModelForImageClassification,
    find_targets,
    optimize_for_inference,
)
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.inference import optimize
from cap_hf.inference.int8_linear import SparseInt8Linear
from cap_hf.inference.linear import SparseLinear, resident_bytes


@pytest.mark.parametrize("backend", ["kernel", "csr"])
@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "Swin", "ConvNext"])
def test_every_architecture_gives_the_same_logits(name, backend):
    model = prune(build(name), 0.8)
    linears = sum(type(target.module) is nn.Linear for target in find_targets(model))
    side = ARCHITECTURES[name][1]
    x = random_batches(model, side)[0]["pixel_values"]
    expected = logits(model, x)
    assert optimize_for_inference(model, backend) is model
    assert len(sparse_layers(model)) == linears
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(CAPError, match="no Linear layer with zeros"):
        optimize_for_inference(prune(build("ResNet"), 0.8))


def test_a_dense_model_is_refused_and_stays_as_it_is():
    model = build("ViT")
    with pytest.raises(CAPError, match="prune it first"):
        optimize_for_inference(model)
    assert not sparse_layers(model)


def test_auto_replaces_what_is_measured_to_be_faster(monkeypatch):
    asked = []

    def is_faster(kind, linear, tokens):
        asked.append((kind, tokens))
        return linear.in_features == 768

    monkeypatch.setattr(optimize, "is_faster", is_faster)
    model = make_vit()
    x, expected = pixels(model), logits(model, pixels(model))
    optimize_for_inference(model)
    assert asked == [(SparseLinear, 65)] * 12  # 8 x 8 patches and the class token
    assert {type(layer.mlp.fc2) for layer in model.vit.layers} == {SparseLinear}
    assert len(sparse_layers(model)) == 2
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4)


def test_dense_memory_is_given_back():
    model = make_vit()
    dense_weight = next(iter(find_targets(model))).weight
    held = sum(target.weight.numel() * 4 for target in find_targets(model))
    rest = resident_bytes(model) - held
    optimize_for_inference(model, "kernel")
    assert resident_bytes(model) - rest <= 0.2 * held
    assert sys.getrefcount(dense_weight) == 2  # this name and the argument: the model holds it no more


def test_state_dict_and_checkpoint_are_those_of_the_dense_model(tmp_path):
    model = make_vit()
    dense = copy.deepcopy(model.state_dict())
    optimize_for_inference(model, "kernel")
    found = model.state_dict()
    assert sorted(found) == sorted(dense)
    for name, tensor in dense.items():
        assert torch.equal(found[name], tensor), name
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in dense.items())


@pytest.mark.parametrize("backend", ["kernel", "csr"])
def test_loading_a_state_dict_packs_it(backend):
    model = optimize_for_inference(make_vit(), backend)
    other = make_vit(0.5)
    model.load_state_dict(other.state_dict())
    x = pixels(model)
    torch.testing.assert_close(logits(model, x), logits(other, x), rtol=1e-4, atol=1e-4)
    state = other.state_dict()
    del state["vit.layers.0.mlp.fc1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.0\.mlp\.fc1\.weight"):
        model.load_state_dict(state)
    state["vit.layers.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=r"fc1\.weight has shape \(3, 3\)"):
        model.load_state_dict(state)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_checkpoint_loads_straight_into_it(tmp_path, compressed):
    expected = make_checkpoint(tmp_path / "pruned", 0.9, compressed=compressed)
    model = SparseModelForImageClassification.from_pretrained(str(tmp_path / "pruned"), backend="kernel")
    assert sparse_layers(model)
    x = pixels(model)
    torch.testing.assert_close(logits(model, x), logits(expected, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compressed", [False, True])
def test_layers_are_chosen_for_images_as_the_processor_makes_them(tmp_path, monkeypatch, compressed):
    """The config tells of the pretraining, 20 pixels; the processor beside it crops 12: 9 patches and a class token."""
    processor = BitImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12})
    save_checkpoint(tmp_path, prune(tiny_dinov2(image_size=20), 0.8), None, None, processor, compressed)
    asked = []
    monkeypatch.setattr(optimize, "is_faster", lambda kind, linear, tokens: bool(asked.append(tokens)))
    model = SparseAutoModel.from_pretrained(str(tmp_path))
    assert set(asked) == {10}
    asked.clear()
    # Beside the checkpoint that it was loaded from there is the processor too.
    optimize_for_inference(model)
    assert set(asked) == {10}
    asked.clear()
    SparseAutoModel.from_pretrained(str(tmp_path), image_size=(8, 16))
    optimize_for_inference(model, image_size=(8, 16))
    assert set(asked) == {2 * 4 + 1}
    asked.clear()
    optimize_for_inference(prune(tiny_dinov2(image_size=20), 0.8))
    assert set(asked) == {26}


@pytest.mark.parametrize("name", ["SigLIP", "CLIP"])
def test_a_composite_classifier_is_optimised(name):
    model = prune(CLASSIFIERS[name].build(), 0.9)
    x = torch.randn(2, 3, 8, 8)
    expected = logits(model, x)
    assert optimize_for_inference(model) is model
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4)


def test_pipeline_and_hooks_work():
    from PIL import Image

    model = make_vit()
    seen = []
    fc1 = model.vit.layers[0].mlp.fc1
    before = fc1.register_forward_hook(lambda module, args, output: seen.append(("before", output.shape)))
    optimize_for_inference(model, "kernel")
    model.vit.layers[0].mlp.fc1.register_forward_pre_hook(lambda module, args: seen.append(("after", args[0].shape)))
    processor = make_processor()
    processor.size = {"height": 32, "width": 32}
    classify = pipeline("image-classification", model=model, image_processor=processor)
    assert len(classify(Image.new("RGB", (40, 50)), top_k=3)) == 3
    assert seen == [("after", (1, 65, 192)), ("before", (1, 65, 768))]
    before.remove()
    logits(model, pixels(model))
    assert len(seen) == 3


def test_compile_and_export_work():
    model = make_vit()
    optimize_for_inference(model, "kernel")
    x, expected = pixels(model), logits(model, pixels(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, x), expected, rtol=1e-4, atol=1e-4)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values=pixel_values).logits

    program = torch.export.export(Logits(), (x,), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}})
    assert "cap_hf.sparse_linear" in str(program.graph)
    more = pixels(model, 5)
    torch.testing.assert_close(program.module()(more), logits(model, more), rtol=1e-4, atol=1e-4)


def test_copies_and_half_precision():
    model = make_vit()
    optimize_for_inference(model, "kernel")
    x, expected = pixels(model), logits(model, pixels(model))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, x), expected)
    half = twin.to(torch.bfloat16)
    assert half.state_dict()["vit.layers.0.mlp.fc1.weight"].dtype == torch.bfloat16
    found = logits(half, x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_training_through_it_is_an_error():
    model = optimize_for_inference(make_vit(), "kernel")
    with pytest.raises(RuntimeError, match="sparse_linear"):
        model(pixel_values=pixels(model)).logits.sum().backward()


def test_weights_that_are_shared_stay_dense():
    model = make_vit()
    layers = model.vit.layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    optimize_for_inference(model, "kernel")
    assert type(layers[0].mlp.fc1) is type(layers[1].mlp.fc1) is nn.Linear
    assert type(layers[0].mlp.fc2) is SparseLinear


def test_what_cannot_run_is_one_line():
    model = make_vit()
    for backend, match in (("fast", "none of auto"), ("semi_structured", "no weight is 2:4")):
        with pytest.raises(CAPError, match=match):
            optimize_for_inference(model, backend)
    with pytest.raises(CAPError, match="float32"):
        optimize_for_inference(copy.deepcopy(model).half())
    with pytest.raises(CAPError, match="does not say how many channels its images have: pass example_inputs"):
        optimize_for_inference(nn.Sequential(copy.deepcopy(model.vit.layers[0].mlp.fc1)))
    optimize_for_inference(model, "kernel")
    with pytest.raises(CAPError, match="input on meta"):
        model.vit.layers[0].mlp.fc1(torch.empty(2, 192, device="meta"))


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        (torch.zeros(1, 3, 224, 224), "example_inputs is of type Tensor: pass a dict"),
        ({"x": torch.zeros(1, 3, 224, 224)}, "has no tensor for 'pixel_values' \\(it has x\\)"),
        ({}, "has no tensor for 'pixel_values' \\(it has nothing\\)"),
        ({"pixel_values": [1.0]}, "has no tensor for 'pixel_values' \\(list\\)"),
    ],
)
def test_an_example_that_is_none_is_one_line(inputs, line):
    with pytest.raises(CAPError, match=line):
        optimize_for_inference(make_vit(0.98), example_inputs=inputs)


def test_what_names_no_checkpoint_is_one_line():
    with pytest.raises(CAPError, match="^None is no name of a checkpoint, a folder or a Hub id, but of type NoneType"):
        SparseAutoModel.from_pretrained(None)


def test_example_inputs_serve_any_module():
    mlp = make_vit(0.98).vit.layers[0].mlp
    x = torch.randn(2, 197, 192)
    expected = mlp(x)
    optimize_for_inference(mlp, example_inputs={"hidden_states": x})
    assert sparse_layers(mlp)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)


class CallsByName(nn.Module):
    """A layer that is called as `torch.nn.Linear` may be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 768)
        self.layer.weight.data[:, 8:] = 0

    def forward(self, x):
        return self.layer(input=x)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("auto", "float32"), ("kernel", "float32"), ("csr", "float32"), ("auto", "int8")]
)
def test_layers_may_be_called_by_name(backend, dtype, monkeypatch):
    monkeypatch.setattr(optimize, "is_faster", lambda *args: True)
    monkeypatch.setattr(optimize, "fastest_kind", lambda *args: SparseInt8Linear)
    module, x = CallsByName().eval(), torch.randn(2, 197, 192)
    expected = module(x)
    optimize_for_inference(module, backend, {"x": x}, dtype=dtype)
    assert type(module.layer) is not nn.Linear
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4 if dtype == "float32" else 0.05)


WITHOUT_COMPILER = """
import sys, torch
from support import inference as tests
from cap_hf import CAPError, optimize_for_inference
from cap_hf.inference import optimize
from cap_hf.inference.linear import CSRLinear
model = tests.make_vit(0.98)
x = tests.pixels(model)
expected = tests.logits(model, x)
optimize_for_inference(model)
torch.testing.assert_close(tests.logits(model, x), expected, rtol=1e-4, atol=1e-4)
assert all(type(layer) is CSRLinear for layer in tests.sparse_layers(model))
optimize_for_inference(tests.make_vit(0.98))
try:
    optimize_for_inference(tests.make_vit(0.98), "kernel")
except CAPError as error:
    print("CAPError", error)
"""


def test_without_a_compiler_it_says_so_once_and_is_right(tmp_path):
    root = Path(__file__).parents[2]
    variables = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "CXX": "false", "CAP_HF_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CAPError backend='kernel' needs a C++ compiler")
    assert done.stderr.count("The C++ kernel sparse_linear cannot be used") == 1
    assert done.stderr.count("PyTorch's CSR product where that is faster") == 1


def test_public_names():
    assert cap_hf.optimize_for_inference is optimize_for_inference
    assert logging.getLogger("cap_hf.inference.optimize").propagate
