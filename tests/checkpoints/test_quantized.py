"""Weights that are no plain floats: named, counted as what they stand for, never taken for numbers in silence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint, make_model, make_processor
from support.inference import prune

from cap_hf import find_targets, quantize_int8
from cap_hf.checkpoints.loading import check_folder, load_checkpoint
from cap_hf.checkpoints.quantized import dequantize, quantization_of
from cap_hf.commands.main import run as run_command
from cap_hf.errors import CAPError


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """A pruned model and a folder with its int8 form."""
    pytest.importorskip("torchao")
    model, folder = prune(make_model(), 0.75), tmp_path_factory.mktemp("int8")
    quantize_int8(model).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return model, folder


def test_a_quantised_model_is_named_and_its_zeros_are_seen(int8):
    model, folder = int8
    loaded = load_checkpoint(folder, dtype="float32")
    assert (quantization_of(model), quantization_of(loaded)) == (None, "torchao")
    assert dequantize(loaded) == "torchao"
    assert dequantize(loaded) is quantization_of(loaded) is None
    for found, target in zip(find_targets(loaded), find_targets(model), strict=True):
        assert type(found.weight) is torch.nn.Parameter
        assert bool((found.weight[target.weight == 0] == 0).all())
        torch.testing.assert_close(found.weight.detach(), target.weight.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("command", "arguments", "code", "words"),
    [
        ("inspect", [], 0, "Its weights are quantised with torchao; what is 0 is what they stand for"),
        ("push", ["--hub_model_id", "a/b", "--dry_run", "true"], 0, "is what would be pushed to a/b: sparsity 7"),
        ("compress", [], 1, "is quantised with torchao: compress the checkpoint in floats that it was made from"),
        ("benchmark", [], 1, "are quantised (torchao): load the checkpoint in floating point that they were made from"),
    ],
)
def test_commands_on_int8(int8, tmp_path, capsys, command, arguments, code, words):
    model, folder = int8
    where = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")]
    assert run_command(command, [*where, *arguments]) == code
    said = capsys.readouterr()
    assert words in (said.err if code else said.out)
    assert (tmp_path / "out").exists() == (code == 0)
    if command == "inspect":
        report = json.loads((tmp_path / "out" / "inspect.json").read_text())
        zeros = sum(int((target.weight == 0).sum()) for target in find_targets(model))
        assert report["quantization"] == "torchao"
        # Rounding makes a few more.
        assert zeros <= report["num_zeros"] < zeros + 0.02 * report["num_weights"]
    if command == "push":
        card = (tmp_path / "out" / "README.md").read_text()
        assert "Its weights are quantised with torchao" in card
        assert "Plain transformers loads it where torchao is installed" in card
        assert not any(word in card for word in ("cap-hf compress", "SparseAutoModel", "compressed |"))


def change(folder, matrices=None, **config):
    """Save a checkpoint, cast its matrices to another dtype, and write further entries into its config."""
    make_checkpoint(folder)
    path = folder / "model.safetensors"
    if matrices is not None:
        cast = {
            name: tensor.to(matrices) if tensor.dim() == 2 and name.endswith(".weight") else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(cast, path, metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64])
def test_numbers_that_stand_for_something_unknown_are_refused(tmp_path, dtype):
    folder = change(tmp_path, dtype)
    with pytest.raises(CAPError, match=r"has .*\.weight in the dtype .*, and config.json has no quantization_config"):
        load_checkpoint(folder)


@pytest.mark.parametrize("config", [{}, {"dtype": "float8_e4m3fn"}])
def test_float8_is_read_as_the_floats_it_is(tmp_path, config):
    folder = change(tmp_path, torch.float8_e4m3fn, **config)
    assert not check_folder(folder).compressed
    model = load_checkpoint(folder, dtype="float32")
    assert quantization_of(model) is None
    half = make_model().to(torch.float8_e4m3fn)
    assert quantization_of(half) == "float8_e4m3fn"
    assert dequantize(half) == "float8_e4m3fn"
    assert half.classifier.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("int8", "has a quantization_config without a quant_method in its config.json: remove it"),
        ({"bits": 4}, "has a quantization_config without a quant_method in its config.json: remove it"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            "needs a package that is not installed, or too old: pip install",
        ),
    ],
)
def test_what_cannot_be_loaded_says_what_is_missing(tmp_path, stated, words):
    folder = change(tmp_path, quantization_config=stated)
    for call in (check_folder, load_checkpoint):
        with pytest.raises(CAPError, match=words):
            call(folder)
            load_checkpoint(folder)
