"""A checkpoint loaded to be run: what is stored in int8 goes into int8 layers as it is, and is never floats."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.backbones import tiny_dinov2
from support.checkpoints import make_int8_checkpoints, make_processor, round_to_int8
from support.inference import logits, make_vit, sparse_layers
from support.models import ARCHITECTURES, build, random_batches
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageClassification

import cap_hf
from cap_hf import (
    CAPError,
    SparseAutoModel,
    SparseModelForImageClassification,
    find_targets,
    optimize_for_inference,
)
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.compression import COMPRESSED_NAME, SCALES
from cap_hf.checkpoints.files import open_safetensors, packed_names
from cap_hf.checkpoints.int8 import unpack_int8
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.inference import optimize
from cap_hf.inference.int8_linear import DenseInt8Linear, SparseInt8Linear, has_dense_int8
from cap_hf.inference.int8_packing import unpack_int8 as unpack_words
from cap_hf.inference.linear import SparseLinear, SparseWeightLinear, StoredInt8Linear
from cap_hf.inference.operators import has_int8_kernel, has_kernel

PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def kernel():
    assert has_int8_kernel(), "no C++ compiler: the kernel cannot be tested"
    assert has_kernel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounded")
    make_int8_checkpoints(folder)
    return folder


def stored_rows(folder):
    """Of each int8 weight in the file its numbers and scales, as a list without names."""
    with open_safetensors(folder / COMPRESSED_NAME) as file:
        names = packed_names(file.keys())
        parts = [{each: file.get_tensor(f"{name}.{each}") for each in names[name]} for name in sorted(names)]
    return [unpack_int8(each) for each in parts if SCALES in each]


def same_rows(found, stored):
    """Whether two lists of numbers and scales hold the same, in any order."""
    key = lambda rows: (rows[0].numpy().tobytes(), rows[1].numpy().tobytes())  # noqa: E731
    return sorted(map(key, found)) == sorted(map(key, stored))


def test_the_layers_hold_the_stored_numbers_and_scales_bit_for_bit(folder):
    model = SparseAutoModel.from_pretrained(str(folder / "int8"), runtime="int8", backend="kernel")
    layers = sparse_layers(model)
    assert {type(layer) for layer in layers} == {SparseInt8Linear}
    assert len(layers) == 12
    found = [(unpack_words(layer.packed_weight()), layer.scales) for layer in layers]
    assert same_rows(found, stored_rows(folder / "int8"))
    assert not any(isinstance(module, StoredInt8Linear) for module in model.modules())
    dense = AutoModelForImageClassification.from_pretrained(folder / "int8")
    expected = logits(optimize_for_inference(dense, dtype="int8", backend="kernel"), PIXELS)
    torch.testing.assert_close(logits(model, PIXELS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SparseInt8Linear, DenseInt8Linear, SparseLinear, None])
def test_every_kind_that_may_be_chosen_computes_with_the_stored_weight(folder, monkeypatch, kind):
    if kind is DenseInt8Linear and not has_dense_int8():
        pytest.skip("PyTorch's dense int8 product needs x86 with VNNI")
    asked = []

    def choose(linear, tokens):
        asked.append((type(linear), tokens))
        return kind

    monkeypatch.setattr(optimize, "fastest_kind", choose)
    # Where other work has the processor, attention in int8 may seem to be the faster one.
    monkeypatch.setattr(optimize, "speed_up_attention", lambda *_: None)
    monkeypatch.setattr(optimize, "speed_up_embeddings", lambda *_: None)
    model = SparseAutoModel.from_pretrained(str(folder / "int8"), runtime="int8")
    assert asked == [(StoredInt8Linear, 5)] * 12
    targets = [module for name, module in model.named_modules() if name.startswith("vit.layers") and is_linear(module)]
    assert {type(module) for module in targets} == {kind or nn.Linear}
    dense = AutoModelForImageClassification.from_pretrained(folder / "int8")
    state = model.state_dict()
    assert state.keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(state[name], tensor), name
    expected = logits(dense, PIXELS)
    difference = (logits(model, PIXELS) - expected).abs().max() / expected.abs().max()
    assert difference < (0.05 if kind in (SparseInt8Linear, DenseInt8Linear) else 1e-5)


def is_linear(module):
    return isinstance(module, (nn.Linear, SparseWeightLinear))


def test_layers_are_chosen_by_measuring_as_for_floats(folder):
    model = SparseAutoModel.from_pretrained(str(folder / "int8"), runtime="int8")
    assert not any(isinstance(module, StoredInt8Linear) for module in model.modules())
    dense = AutoModelForImageClassification.from_pretrained(folder / "int8")
    assert float((logits(model, PIXELS) - logits(dense, PIXELS)).norm() / logits(dense, PIXELS).norm()) < 0.05


class Largest(TorchDispatchMode):
    """Sees the largest tensor in floats that an operator gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta:
            self.numel = max(self.numel, out.numel())
        return out


def test_no_floats_are_made_of_a_stored_weight(tmp_path):
    model = make_vit(0.75)
    save_checkpoint(tmp_path, model, image_processor=make_processor(), compressed="int8")
    smallest = min(target.weight.numel() for target in find_targets(model))
    for runtime, below in (("int8", True), ("float32", False)):
        with Largest() as largest:
            SparseAutoModel.from_pretrained(str(tmp_path), runtime=runtime, backend="kernel")
        assert (largest.numel < smallest) is below
        # What is not pruned is seen, so the mode sees what is loaded.
        assert largest.numel >= model.config.hidden_size * model.config.num_labels


PEAK = """
import sys
from pathlib import Path
import cap_hf
from cap_hf import SparseAutoModel
from cap_hf.inference.operators import has_int8_kernel
import transformers.models.vit.modeling_vit
has_int8_kernel()
def kilobytes(name):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if name in line)
before = kilobytes("VmRSS")
SparseAutoModel.from_pretrained(sys.argv[1], runtime="int8", backend="kernel")
print(kilobytes("VmHWM") - before)
"""


def test_loading_takes_less_memory_than_by_way_of_floats(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    set_seed(0)
    config = ViTConfig(hidden_size=768, num_hidden_layers=6, intermediate_size=3072, image_size=32, patch_size=8)
    model = ViTForImageClassification(config)
    floats = 0
    for target in find_targets(model):
        target.weight.data.unflatten(1, (-1, 4))[:, torch.rand(target.weight.shape[1] // 4) < 0.75] = 0
        floats += 4 * target.weight.numel()
    save_checkpoint(tmp_path / "plain", model, image_processor=make_processor())
    del model
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    compress_checkpoint(tmp_path / "plain", tmp_path / "int8", int8=True)
    kilobytes = {}
    for name in ("compressed", "int8"):
        code = [sys.executable, "-c", PEAK, str(tmp_path / name)]
        done = subprocess.run(code, capture_output=True, text=True, cwd=Path(cap_hf.__file__).parents[1], timeout=300)
        assert done.returncode == 0, done.stderr
        kilobytes[name] = int(done.stdout)
    assert kilobytes["compressed"] - kilobytes["int8"] > 0.5 * floats / 1024


def test_a_backbone_and_weights_that_the_model_splits(tmp_path):
    """Dinov2's SwiGLU is one weight in the file and two layers in the model: floats are made of it, and rounded."""
    model = tiny_dinov2(use_swiglu_ffn=True)
    for target in find_targets(model):
        target.weight.data[target.weight.shape[0] // 8 :] = 0
    save_checkpoint(tmp_path, model, image_processor=make_processor(), compressed="int8")
    loaded = SparseAutoModel.from_pretrained(str(tmp_path), runtime="int8", backend="kernel")
    assert len(sparse_layers(loaded)) == len(find_targets(model))
    with torch.inference_mode():
        expected, found = (each(pixel_values=PIXELS).last_hidden_state for each in (round_to_int8(model), loaded))
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Swin", "ConvNext"])
def test_other_architectures(name, tmp_path):
    model = build(name)
    for target in find_targets(model):
        target.weight.data[target.weight.shape[0] // 8 :] = 0
    save_checkpoint(tmp_path, model, compressed="int8")
    loaded = SparseAutoModel.from_pretrained(str(tmp_path), runtime="int8", backend="kernel")
    linears = sum(type(target.module) is nn.Linear for target in find_targets(model))
    assert len([layer for layer in sparse_layers(loaded) if type(layer) is SparseInt8Linear]) == linears
    x = random_batches(model, ARCHITECTURES[name][1])[0]["pixel_values"]
    expected = logits(model, x)
    assert float((logits(loaded, x) - expected).norm() / expected.norm()) < 0.05


def test_the_float_runtime_takes_an_int8_checkpoint_too(folder):
    model = SparseAutoModel.from_pretrained(str(folder / "int8"), backend="kernel")
    dense = AutoModelForImageClassification.from_pretrained(folder / "int8")
    torch.testing.assert_close(logits(model, PIXELS), logits(dense, PIXELS), rtol=1e-4, atol=1e-5)
    assert {type(layer) for layer in sparse_layers(model)} == {SparseLinear}


def test_what_is_loaded_to_be_run_in_int8_saves_as_floats(folder, tmp_path):
    model = SparseModelForImageClassification.from_pretrained(
        str(folder / "int8"), runtime="int8", backend="kernel", device_map="cpu"
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    for name, tensor in AutoModelForImageClassification.from_pretrained(folder / "int8").state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_what_cannot_run_in_int8_is_one_line(folder, monkeypatch):
    with pytest.raises(CAPError, match="runtime 'int4' is none of float32, int8"):
        SparseAutoModel.from_pretrained(str(folder / "int8"), runtime="int4")
    with pytest.raises(CAPError, match="compute in float32: load the model with dtype='float32'"):
        SparseAutoModel.from_pretrained(str(folder / "int8"), runtime="int8", dtype="bfloat16")
    monkeypatch.setattr(optimize, "has_int8_kernel", lambda: False)
    with pytest.raises(CAPError, match="needs a C\\+\\+ compiler"):
        SparseAutoModel.from_pretrained(str(folder / "int8"), runtime="int8")


def test_a_stored_layer_is_a_linear_with_its_floats():
    linear = nn.Linear(6, 4).eval()
    quantized, scales = torch.randint(-127, 128, (4, 6), dtype=torch.int8), torch.rand(4)
    layer = StoredInt8Linear(linear, quantized, scales)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, quantized * scales[:, None])
    assert dense.bias is linear.bias
    assert not dense.training
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x), dense(x))
    assert re.match(r"StoredInt8Linear\(in_features=6, out_features=4, bias=True\)", repr(layer))
    half = StoredInt8Linear(linear.half(), quantized, scales)
    assert half.weight.dtype == torch.float16


def test_public_names():
    assert cap_hf.SparseAutoModel is SparseAutoModel
    assert issubclass(SparseModelForImageClassification, SparseAutoModel)
