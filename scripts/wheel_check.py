"""Check an installed wheel where there is no compiler: its kernels are loaded, are right, and prune and run a model.

Usage: `python scripts/wheel_check.py`, in the environment of the wheel, as `scripts/wheel.sh` calls it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import cap_hf
from cap_hf import CAPCompressor, CAPConfig, optimize_for_inference
from cap_hf.inference.int8_packing import pack_int8, quantize_rows
from cap_hf.inference.operators import has_int8_kernel, has_kernel, sparse_int8_linear, sparse_linear
from cap_hf.inference.packing import pack
from cap_hf.kernels import cache, libraries
from cap_hf.kernels.build import load_extension


def main() -> None:
    """Check all of it, and print one line.

    Raises:
        AssertionError: something is not as it should be.
    """
    for compiler in ("c++", "g++", "gcc", "cc", "clang", "clang++"):
        assert shutil.which(compiler) is None, f"{compiler} is on PATH"
    assert libraries.FOLDER.is_dir(), f"{cap_hf.__file__} is not of a wheel with kernels"
    check_kernels()
    check_a_model()
    assert not cache.cache_folder().exists(), "something was compiled"
    command = Path(sys.executable).with_name("cap-hf")
    said = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "prune" in said, said
    print(f"cap_hf {cap_hf.__version__} with PyTorch {torch.__version__}: kernels of the wheel, without a compiler")


def check_kernels() -> None:
    """Compare the operators with what PyTorch computes."""
    assert load_extension("elimination")
    assert has_kernel()
    assert has_int8_kernel()
    torch.manual_seed(0)
    weight = torch.randn(150, 300).masked_fill(torch.rand(150, 300) < 0.75, 0)
    x, bias = torch.randn(70, 300), torch.randn(150)
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(sparse_linear(x, pack(weight), bias), expected, rtol=1e-4, atol=1e-4)
    found = sparse_int8_linear(x, pack_int8(weight), bias)
    assert torch.equal(found, sparse_int8_linear(x, pack_int8(weight), bias, "portable"))
    quantized, scales = quantize_rows(weight)
    rounded = torch.nn.functional.linear(x, quantized * scales[:, None], bias)
    assert (found - rounded).norm() < 0.02 * rounded.norm()
    rows = torch.randn(4, 200, 64, dtype=torch.float64)
    fisher = rows.mT @ rows
    inverse, info = torch.ops.cap_hf.invert(fisher)
    assert not info.any()
    torch.testing.assert_close(inverse @ fisher, torch.eye(64, dtype=torch.float64).expand(4, 64, 64))


def check_a_model() -> None:
    """Prune a small ViT that knows nothing, save and load it, and run it with both kernels."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    model = ViTForImageClassification(config).eval()
    batches = [{"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8) % 2} for _ in range(4)]
    compressor = CAPCompressor(model, CAPConfig(num_grads=32))
    compressor.collect(batches)
    compressor.prune(0.75)
    with tempfile.TemporaryDirectory() as folder:
        compressor.save_pretrained(folder)
        loaded = ViTForImageClassification.from_pretrained(folder).eval()
    images = batches[0]["pixel_values"]
    with torch.no_grad():
        expected = loaded(images).logits
        found = optimize_for_inference(loaded, "kernel")(images).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
