"""Compressed checkpoints through `from_pretrained`."""

import copy
import json
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import (
    PYTHON,
    assert_same_weights,
    clean_environment,
    make_checkpoint,
    make_int8_checkpoints,
    make_model,
    round_to_int8,
)
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTForImageClassification,
)

from cap_hf import CAPCompressor, CAPConfig, CAPError, find_targets
from cap_hf.checkpoints import files, quantizer
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.compression import COMPRESSED_INDEX_NAME, COMPRESSED_NAME
from cap_hf.checkpoints.files import load_file
from cap_hf.checkpoints.form import stored_form
from cap_hf.checkpoints.weights import find_weight_files
from cap_hf.inference.linear import StoredInt8Linear


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = make_checkpoint(folder / "plain")
    compress_checkpoint(folder / "plain", folder / "compressed")
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    compress_checkpoint(folder / "shards", folder / "sharded")
    return folder, model


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """The folder, and the model as int8 weights stand for it."""
    folder = tmp_path_factory.mktemp("rounded")
    model = make_int8_checkpoints(folder)
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    compress_checkpoint(folder / "shards", folder / "int8-sharded", int8=True)
    return folder, round_to_int8(model)


def test_files(saved):
    folder, _ = saved
    assert (folder / "compressed" / COMPRESSED_NAME).is_file()
    assert (folder / "sharded" / COMPRESSED_INDEX_NAME).is_file()
    assert len(find_weight_files(folder / "sharded").paths) > 1
    assert not list((folder / "sharded").glob("model-*"))
    assert (folder / "compressed" / "preprocessor_config.json").is_file()
    dense, small = (find_weight_files(folder / name).num_bytes for name in ("plain", "compressed"))
    assert small < 0.6 * dense  # the embeddings of so small a model are a large part of it


@pytest.mark.parametrize("name", ["compressed", "sharded"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
    ],
)
def test_loads_bit_for_bit(saved, name, arguments):
    folder, model = saved
    loaded, info = AutoModelForImageClassification.from_pretrained(folder / name, output_loading_info=True, **arguments)
    assert not any(info.values())
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("name", ["int8", "int8-sharded"])
@pytest.mark.parametrize("arguments", [{}, {"dtype": "auto"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}])
def test_int8_loads_as_the_floats_that_it_stands_for(rounded, name, arguments):
    folder, model = rounded
    loaded, info = AutoModelForImageClassification.from_pretrained(folder / name, output_loading_info=True, **arguments)
    assert not any(info.values())
    assert_same_weights(loaded, model)
    assert not loaded.is_quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_int8_is_multiplied_in_float32_and_then_cast(rounded, dtype):
    folder, model = rounded
    loaded = AutoModelForImageClassification.from_pretrained(folder / "int8", dtype=dtype)
    assert_same_weights(loaded, copy.deepcopy(model).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_int8_of_another_dtype_comes_back_in_it(dtype, tmp_path):
    model = make_checkpoint(tmp_path / "first", pattern="1x4").to(dtype)
    model.save_pretrained(tmp_path / "plain")
    compress_checkpoint(tmp_path / "plain", tmp_path / "int8", int8=True)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "int8", dtype="auto")
    assert_same_weights(loaded, round_to_int8(model.float()).to(dtype))
    form = stored_form(tmp_path / "int8")
    assert form.dtype == (dtype if dtype.itemsize == 2 else None)


def test_int8_on_the_meta_device_and_on_the_disk(rounded, tmp_path):
    folder, model = rounded
    loaded = AutoModelForImageClassification.from_pretrained(folder / "int8", device_map="meta")
    assert all(parameter.is_meta for parameter in loaded.parameters())
    device_map = {"vit.embeddings": "cpu", "vit.layernorm": "cpu", "classifier": "cpu", "vit.layers": "disk"}
    loaded = AutoModelForImageClassification.from_pretrained(
        folder / "int8", device_map=device_map, offload_folder=tmp_path
    )
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_int8_saved_again_is_a_plain_checkpoint(rounded, tmp_path):
    folder, model = rounded
    AutoModelForImageClassification.from_pretrained(folder / "int8").save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "plain/model.safetensors").keys()
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path), model)


def test_only_int8_has_a_version_that_earlier_readers_refuse(saved, rounded):
    for folder, version in ((saved[0] / "compressed", 1), (rounded[0] / "int8", 2), (rounded[0] / "int8-sharded", 2)):
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == version


def test_keeping_int8_puts_the_stored_numbers_in_place(rounded):
    folder, model = rounded

    def build(linear, quantized, scales):
        layer = torch.nn.Linear(linear.in_features, linear.out_features, device="meta")
        layer.weight, layer.bias = torch.nn.Parameter(quantized * scales[:, None]), linear.bias
        built.append((quantized, scales))
        return layer

    for arguments, count in (({}, 12), ({"device_map": "cpu"}, 12), ({"device_map": "auto"}, 0)):
        built = []
        with quantizer.keep_int8(build):
            loaded, info = AutoModelForImageClassification.from_pretrained(
                folder / "int8", output_loading_info=True, **arguments
            )
        assert not any(info.values())
        assert len(built) == count
        assert all(quantized.dtype == torch.int8 and scales.dtype == torch.float32 for quantized, scales in built)
        assert_same_weights(loaded, model)
    built = []
    with quantizer.keep_int8(build):
        AutoModelForImageClassification.from_pretrained(folder / "plain")
    AutoModelForImageClassification.from_pretrained(folder / "int8")
    assert not built


class OwnLinear(torch.nn.Linear):
    """May compute something else than its base."""


class OwnViT(ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.vit.layers:
            layer.mlp.fc1 = OwnLinear(config.hidden_size, config.intermediate_size)


def test_an_int8_weight_of_another_layer_than_a_plain_linear_becomes_floats(rounded):
    folder, model = rounded
    with quantizer.keep_int8(StoredInt8Linear):
        loaded = OwnViT.from_pretrained(folder / "int8")
    for layer, expected in zip(loaded.vit.layers, model.vit.layers, strict=True):
        assert type(layer.mlp.fc1) is OwnLinear
        assert torch.equal(layer.mlp.fc1.weight, expected.mlp.fc1.weight)
        assert type(layer.mlp.fc2) is StoredInt8Linear
        assert torch.equal(layer.mlp.fc2.weight, expected.mlp.fc2.weight)
        assert torch.equal(layer.mlp.fc2.bias, expected.mlp.fc2.bias)


@pytest.mark.parametrize(
    ("part", "damage", "line"),
    [
        ("cap_scales", lambda part: part.fill_(-1), "has a scale that is NaN"),
        ("cap_scales", lambda part: part[1:].clone(), "has not one scale per row"),
        ("cap_values", lambda part: part[1:].clone(), "its bitmask marks"),
        ("cap_bitmask", lambda part: part[1:].clone(), "of a wrong shape"),
        ("cap_shape", lambda part: part.to(torch.uint8), "of no weight of a Linear"),
    ],
)
def test_damaged_int8_is_refused_in_one_line(rounded, tmp_path, part, damage, line):
    folder, _ = rounded
    shutil.copytree(folder / "int8", tmp_path / "c")
    path = tmp_path / "c" / COMPRESSED_NAME
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith(part))
    tensors[name] = damage(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    for kept in (False, True):
        with (
            pytest.raises(CAPError, match=line) as error,
            quantizer.keep_int8((lambda *_: pytest.fail("it was built")) if kept else None),
        ):
            AutoModelForImageClassification.from_pretrained(tmp_path / "c")
        assert "\n" not in str(error.value)


def test_int8_that_unpacks_to_more_than_the_memory_is_refused(rounded, monkeypatch):
    """Where it stays int8 it needs less."""
    folder, _ = rounded
    contents = files.check_file(folder / "int8" / COMPRESSED_NAME)
    plain = files.check_file(folder / "plain" / "model.safetensors")
    assert contents.dense_bytes == plain.dense_bytes
    assert contents.dtypes == plain.dtypes
    targets = 2 * (4 * 48 * 48 + 2 * 48 * 96)
    assert contents.int8_bytes == 3 * targets
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: memory(contents.dense_bytes - 1))
    with pytest.raises(CAPError, match="of memory are free"):
        AutoModelForImageClassification.from_pretrained(folder / "int8")
    with quantizer.keep_int8(StoredInt8Linear):
        AutoModelForImageClassification.from_pretrained(folder / "int8")
        monkeypatch.setattr(files.psutil, "virtual_memory", lambda: memory(contents.dense_bytes - 3 * targets - 1))
        with pytest.raises(CAPError, match="of memory are free"):
            AutoModelForImageClassification.from_pretrained(folder / "int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loads_in_another_dtype_as_the_plain_checkpoint_does(saved, dtype):
    folder, _ = saved
    loaded = AutoModelForImageClassification.from_pretrained(folder / "compressed", dtype=dtype)
    assert_same_weights(loaded, AutoModelForImageClassification.from_pretrained(folder / "plain", dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_checkpoint_in_another_dtype(dtype, tmp_path):
    model = make_checkpoint(tmp_path / "first").to(dtype)
    model.save_pretrained(tmp_path / "plain")
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "compressed", dtype="auto")
    assert_same_weights(loaded, model)


def test_meta_device_and_disk(saved, tmp_path):
    folder, model = saved
    loaded = AutoModelForImageClassification.from_pretrained(folder / "compressed", device_map="meta")
    assert all(parameter.is_meta for parameter in loaded.parameters())
    device_map = {"vit.embeddings": "cpu", "vit.layernorm": "cpu", "classifier": "cpu", "vit.layers": "disk"}
    loaded = AutoModelForImageClassification.from_pretrained(
        folder / "compressed", device_map=device_map, offload_folder=tmp_path
    )
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_what_is_loaded_is_a_plain_model(saved, tmp_path):
    folder, model = saved
    loaded = AutoModelForImageClassification.from_pretrained(folder / "compressed")
    assert not loaded.is_quantized
    assert not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "transformers_weights" not in config
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(folder / "plain" / "model.safetensors").keys()
    )
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "again"), model)
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_convolutions_and_patterns(tmp_path):
    config = ConvNextConfig(num_stages=2, hidden_sizes=[32, 64], depths=[1, 1], image_size=16, num_labels=3)
    model = ConvNextForImageClassification(config).eval()
    for target in find_targets(model, exclude=["*dwconv"]):
        blocks = target.to_blocks(target.weight.detach()).reshape(-1, 4).clone()
        blocks[:, 1:3] = 0
        target.weight.data.copy_(target.from_blocks(blocks.view(target.num_blocks, target.block_size)))
    model.save_pretrained(tmp_path / "plain")
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    with safe_open(tmp_path / "compressed" / COMPRESSED_NAME, "pt") as file:
        assert any(name.endswith("cap_codes") for name in file.keys())  # noqa: SIM118
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "compressed"), model)


def test_compressor_saves_compressed(tmp_path):
    model = make_model()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True)
    compressor.prune(0.9)
    compressor.save_pretrained(tmp_path / "c", compressed=True)
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "c"), model)
    assert (tmp_path / "c" / "report.json").is_file()
    assert not (tmp_path / "c" / "model.safetensors").exists()


def test_damaged_files_are_refused_in_one_line(saved, tmp_path):
    folder, _ = saved
    compress_checkpoint(folder / "plain", tmp_path / "c")
    path = tmp_path / "c" / COMPRESSED_NAME
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith("cap_bitmask"))
    tensors[name][0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its bitmask marks \d+: the file is damaged"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "c")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "c")


def test_a_file_that_unpacks_to_more_than_the_memory_is_refused(saved, monkeypatch):
    folder, _ = saved
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(files.psutil, "virtual_memory", lambda: memory(1000))
    for arguments in ({}, {"device_map": {"": "cpu"}}):
        with pytest.raises(CAPError, match="of memory are free"):
            AutoModelForImageClassification.from_pretrained(folder / "compressed", **arguments)
    AutoModelForImageClassification.from_pretrained(folder / "compressed", device_map="meta")


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_tensors_that_are_missing_or_renamed_never_come_up_random(saved, tmp_path, change):
    folder, _ = saved
    compress_checkpoint(folder / "plain", tmp_path / "c")
    path = tmp_path / "c" / COMPRESSED_NAME
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in sorted(tensors) if name.endswith("bias"))
    tensor = tensors.pop(name)
    if change == "renamed":
        tensors[name.replace("bias", "b1as")] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not those that config.json tells of"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [("weights_file", "../model.safetensors", "names the compressed weights"), ("format_version", 99, "update cap_hf")],
)
def test_a_config_that_cannot_be_followed(saved, tmp_path, key, value, error):
    folder, _ = saved
    compress_checkpoint(folder / "plain", tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CAPError, match=error):
        AutoModelForImageClassification.from_pretrained(tmp_path / "c")


def test_compressing_what_cannot_be(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(CAPError, match="compressed already"):
        compress_checkpoint(folder / "compressed", tmp_path / "twice")
    with pytest.raises(CAPError, match="is the checkpoint itself"):
        compress_checkpoint(folder / "plain", folder / "plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CAPError, match=r"there is no model\.safetensors"):
        compress_checkpoint(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_cap_hf_loading_fails_and_says_what_to_import(saved, tmp_path):
    folder, _ = saved
    script = f"""
import sys
from transformers import AutoModelForImageClassification, pipeline
assert "cap_hf" not in sys.modules
for name in ("compressed", "sharded"):
    for load in (AutoModelForImageClassification.from_pretrained, lambda path: pipeline("image-classification", path)):
        try:
            load({str(folder)!r} + "/" + name)
        except Exception as error:
            assert "import cap_hf" in str(error), error
        else:
            raise SystemExit("it was loaded")
print(pipeline("image-classification", {str(folder / "plain")!r}).model.num_parameters())
"""
    done = subprocess.run(
        [PYTHON, "-c", script],
        env=clean_environment(tmp_path, HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().isdigit()
