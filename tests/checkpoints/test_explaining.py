"""One line about a checkpoint that cannot be loaded; what commands do with it is in commands/test_odd_inputs.py."""

import re

import pytest
from torch import nn
from transformers import ViTConfig

from cap_hf.checkpoints.explaining import (
    explain,
    explain_format,
    explain_mismatch,
    explain_missing,
    explain_processor,
    missing_package,
    prefix_of,
)


@pytest.mark.parametrize(
    ("said", "package"),
    [
        ("TimmWrapperConfig requires the timm library but it was not found. `pip install timm`", "'cap_hf[timm]'"),
        ("Some classes. Missing optional dependencies: torchvision. Please install", "torchvision"),
        ("Loading a GPTQ quantized model requires optimum (`pip install optimum`)", "optimum"),
        ("model requires torchao library (`pip install torchao`)", "'cap_hf[quantization]'"),
        ("8-bit quantization requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`", "bitsandbytes"),
        ("No module named 'kornia.geometry'", "kornia"),
        ("No module named 'PIL'", "pillow"),
        ("No module named 'sklearn.utils'", "scikit-learn"),
        ("The installed version of bitsandbytes (<0.39) is too old; `pip install -U bitsandbytes`", "bitsandbytes"),
        # A module of the checkpoint's own code, which is nothing to install.
        ("No module named 'modeling_helpers'", None),
        ("Please pip install -U 'flash-attn>=2'", None),
        ("update Transformers with the command `pip install --upgrade transformers`", None),
        ("Error no file named model.safetensors found", None),
        ("operator torchvision::nms does not exist", None),
    ],
)
def test_a_package_that_is_missing_is_found_in_what_a_library_says(said, package):
    assert missing_package(said) == package


@pytest.mark.parametrize(
    ("missing", "unexpected", "prefix"),
    [
        (["a.weight", "b.bias"], ["net.a.weight", "net.b.bias"], "net."),
        (["a.weight", "b.bias"], ["net.a.weight", "net.b.bias", "loss.weight"], "net."),
        (["a.weight", "b.bias"], ["net.a.weight"], ""),
        (["a.weight"], ["xa.weight"], ""),
        (["a.weight"], [], ""),
        ([], ["a.weight"], ""),
    ],
)
def test_a_prefix_is_one_only_if_every_missing_weight_is_found_behind_it(missing, unexpected, prefix):
    assert prefix_of(missing, unexpected) == prefix


def test_weights_that_are_nowhere_are_named():
    line = explain_missing("x", nn.Linear(1, 1), {"b", "a"}, {"c"})
    assert line.startswith("x has no weights for a, b of a Linear: name the class")


def test_a_head_of_another_size_is_told_from_other_shapes():
    model = nn.Module()
    model.config = ViTConfig(num_labels=5)
    head = [("head.weight", (2, 8), (5, 8)), ("head.bias", (2,), (5,))]
    assert "x has a head of 2 classes (head.bias, head.weight), and its config.json has 5" in explain_mismatch(
        "x", model, head
    )
    line = explain_mismatch("x", model, [*head, ("body.weight", (4, 4), (8, 4))])
    assert "of different models: body.weight (4, 4) and not (8, 4), head.bias (2,) and not (5,), head.weight" in line


def test_what_is_on_the_hub_is_no_folder_to_look_into():
    """The name of a Hub checkpoint may be that of nothing here."""
    error = OSError("a/b does not appear to have a file named model.safetensors or model.safetensors.index.json")
    assert explain("a/b", error).startswith("a/b has no weights as safetensors: ")
    assert "--model_revision refs/pr/1" in explain("a/b", error)
    assert explain("a/b", OSError("two\nlines")) == "a/b cannot be loaded: two lines"
    assert explain_processor("a/b", OSError("two\nlines")) == "the image processor of a/b cannot be loaded: two lines"


def test_what_is_said_of_trust_is_about_code_only_where_code_is_brought_along():
    error = TypeError("got an unexpected keyword argument 'trust_remote_code'")
    assert explain("a/b", error) == "a/b cannot be loaded: got an unexpected keyword argument 'trust_remote_code'"


def test_an_empty_quantization_config_is_not_to_blame(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": null}')
    assert explain(tmp_path, ValueError("nonsense")) == f"{tmp_path} cannot be loaded: nonsense"


def test_every_kind_of_foreign_weights_is_named(tmp_path):
    for name in ("b.bin", "a.ckpt", "tf_model.h5", "flax_model.msgpack"):
        (tmp_path / name).touch()
    found = re.search(r"its weights in (.*): only", explain_format(tmp_path))
    assert found[1] == "a.ckpt, b.bin, flax_model.msgpack ... (4 in all)"
