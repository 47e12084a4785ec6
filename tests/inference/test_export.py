"""ONNX: the zeros are in the file, and two runtimes give what PyTorch gives, for any batch size."""

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from support.backbones import TINY, tiny_clip, tiny_dinov2, tiny_mae
from support.families import CLASSIFIERS
from support.inference import prune
from support.models import ARCHITECTURES, build, random_batches
from transformers import BitImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

from cap_hf import CAPError, export_onnx, find_targets, optimize_for_inference
from cap_hf.inference import export
from cap_hf.inference.runtimes import kept_signal_stack, need_onnxruntime
from cap_hf.towers import see

onnxruntime = need_onnxruntime()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = prune(build("ViT"), 0.8)
    return model, export_onnx(model, tmp_path_factory.mktemp("export") / "onnx")


def pixels(model, batch_size):
    return random_batches(model, 8, (batch_size,))[0]["pixel_values"]


def test_zeros_are_kept(exported):
    model, path = exported
    stored = [onnx.numpy_helper.to_array(each, str(path.parent)) for each in onnx.load(path).graph.initializer]
    for target in find_targets(model):
        weight = target.weight.detach().numpy()
        assert (weight == 0).mean() > 0.5
        # The exporter may turn a weight around.
        assert any(np.array_equal(array, each) for array in stored for each in (weight, weight.T)), target.name


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_onnx_runtime_takes_any_batch(exported, batch_size):
    model, path = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = pixels(model, batch_size)
    with torch.inference_mode():
        expected = model(x).logits
    (logits,) = session.run(None, {"pixel_values": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_openvino_reads_it(exported, batch_size):
    openvino = pytest.importorskip("openvino")
    model, path = exported
    with kept_signal_stack():
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = pixels(model, batch_size)
    with torch.inference_mode():
        expected = model(x).logits
    torch.testing.assert_close(torch.from_numpy(compiled([x.numpy()])[0]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Swin", "ConvNext"])
def test_other_architectures(name, tmp_path):
    model = prune(build(name), 0.8)
    before = model.config._attn_implementation
    # export_onnx itself compares ONNX Runtime's logits for three batch sizes, and other sizes of images.
    path = export_onnx(model, tmp_path / "onnx")
    assert takes(path) == (["height", "width"] if name == "ConvNext" else [16, 16])
    assert (tmp_path / "onnx" / "config.json").exists()
    assert model.config._attn_implementation == before
    assert ARCHITECTURES[name][1] == model.config.image_size or name == "ConvNext"


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    def write_another(model, *arguments):
        with torch.no_grad():
            model.classifier.bias.add_(1.0)
        write(model, *arguments)
        with torch.no_grad():
            model.classifier.bias.sub_(1.0)

    write = export.write_onnx
    monkeypatch.setattr(export, "write_onnx", write_another)
    with pytest.raises(CAPError, match="results differ by 1 on 2 images of 8 x 8: not written"):
        export_onnx(build("ViT"), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(CAPError, match="computes in float32: load the model with dtype='float32'"):
        export_onnx(build("ViT").half(), tmp_path / "onnx")
    with pytest.raises(CAPError, match=r"fails on pixel_values of \(2, 3, 12, 12\) \(its config tells of .*, 8, 8\)\)"):
        export_onnx(build("ViT"), tmp_path / "onnx", image_size=12)
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(CAPError, match="was optimised for inference, .*: load it anew"):
        export_onnx(optimize_for_inference(prune(build("ViT"), 0.8), "kernel"), tmp_path / "onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CAPError, match=r"onnxruntime is not installed: pip install 'cap_hf\[export\]'"):
        export_onnx(build("ViT"), tmp_path / "onnx")


def takes(path):
    """Return the height and width of the images that an ONNX file takes."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()[0].shape[2:]


def test_a_file_takes_the_images_of_its_processor_and_of_other_sizes_where_the_model_does(tmp_path):
    """DINOv2 was pretrained with 518 pixels and is used with 224; here with 20 and 12."""
    model = prune(tiny_dinov2(image_size=20), 0.8)
    processor = BitImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12})
    path = export_onnx(model, tmp_path / "free", processor)
    assert takes(path) == ["height", "width"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    made = processor(images=[Image.new("RGB", (30, 25), "red")], return_tensors="pt")["pixel_values"]
    assert made.shape == (1, 3, 12, 12)
    for x in (made, torch.randn(2, 3, 20, 20), torch.randn(1, 3, 29, 14)):
        with torch.inference_mode():
            expected = model(x).last_hidden_state
        (found,) = session.run(["last_hidden_state"], {"pixel_values": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_a_composite_model_is_exported(tmp_path):
    model = CLASSIFIERS["SigLIP"].build()
    assert takes(export_onnx(model, tmp_path / "siglip")) == [8, 8]


def test_rows_of_patches_have_no_onnx_form(tmp_path):
    config = Siglip2VisionConfig(**TINY, patch_size=4, num_patches=16, num_channels=3)
    with pytest.raises(CAPError, match="spatial_shapes, of shapes that differ from image to image"):
        export_onnx(Siglip2VisionModel(config), tmp_path / "onnx")


@pytest.mark.parametrize("make", [tiny_dinov2, tiny_clip, tiny_mae])
def test_a_backbone_gives_its_tokens_for_any_batch(make, tmp_path):
    model = prune(make(), 0.8)
    path = export_onnx(model, tmp_path / "m", free_size=False)
    assert takes(path) == [8, 8]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        expected = see(model, {"pixel_values": x}).last_hidden_state
    (found,) = session.run(["last_hidden_state"], {"pixel_values": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_a_file_that_the_runtime_refuses_is_one_line(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(CAPError, match="ONNX Runtime cannot run 2 images of 8 x 8: .*"):
        export.check_onnx(onnxruntime, build("ViT"), tmp_path / "broken.onnx", [torch.zeros(2, 3, 8, 8)])
