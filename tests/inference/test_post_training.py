"""int8 of other runtimes: what is quantised."""

import logging

import onnx
import pytest
import torch
from support.inference import make_vit
from support.models import build

from cap_hf.extras import need
from cap_hf.inference.example import make_example
from cap_hf.inference.export import prepare, write_checked
from cap_hf.inference.post_training import has_attention, quantize_onnx, quantize_openvino, quiet
from cap_hf.inference.runtimes import kept_signal_stack
from cap_hf.towers import MainOutput


def export(model, folder):
    """The model's ONNX file."""
    path = folder / "model.onnx"
    write_checked(prepare(model), model, make_example(model, 2), path)
    return path


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_openvino_computes_in_int8(name, tmp_path, capfd):
    nncf = pytest.importorskip("nncf", reason="NNCF is not installed: pip install 'cap_hf[benchmark]'")
    model = make_vit() if name == "ViT" else build(name)
    core = need("openvino", "export").Core()
    images = make_example(model, 5)["pixel_values"]
    network = core.read_model(str(export(model, tmp_path)))
    capfd.readouterr()
    quantized = quantize_openvino(nncf, network, images, has_attention(model))
    assert capfd.readouterr().out == ""
    kinds = [node.get_type_name() for node in quantized.get_ops()]
    assert kinds.count("FakeQuantize") > 1
    assert "FakeQuantize" not in [node.get_type_name() for node in network.get_ops()]
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    with kept_signal_stack():
        found = torch.from_numpy(core.compile_model(quantized, "CPU", settings)([images.numpy()])[0])
    with torch.inference_mode():
        expected = MainOutput(model)(images)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_onnx_runtime_multiplies_in_int8(tmp_path):
    model = make_vit()
    quantize_onnx(export(model, tmp_path), tmp_path / "int8.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    # Six products in each of two layers, and the head; the patches' convolution stays.
    assert kinds.count("MatMulInteger") == 13
    assert kinds.count("Conv") == 1


def test_attention_is_found_by_name():
    assert has_attention(build("ViT"))
    assert has_attention(build("Swin"))
    assert not has_attention(build("ResNet"))
    assert not has_attention(build("ConvNext"))


def test_quiet_is_over_afterwards(capsys, caplog):
    logger = logging.getLogger("loud")
    with quiet("loud"):
        print("a bar")
        logger.warning("a hint")
    logger.warning("heard")
    print("seen")
    assert capsys.readouterr().out == "seen\n"
    assert caplog.messages == ["heard"]
