"""int8 of other runtimes, after training: OpenVINO's by way of NNCF, and ONNX Runtime's."""

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cap_hf.inference.runtimes import kept_signal_stack

# NNCF takes 300 by default; statistics of more images hardly change.
MAX_IMAGES = 300


def quantize_openvino(nncf: ModuleType, network: Any, images: torch.Tensor, transformer: bool) -> Any:
    """Return an OpenVINO network in int8, as OpenVINO recommends it: weights, and activations by calibration.

    Args:
        nncf: the package, see `cap_hf.inference.runtimes`.
        network: as OpenVINO has read it; left as it is.
        images: `(n, channels, height, width)` that the ranges of activations are taken from, 300 at most.
        transformer: whether attention is among its layers: its scores stay float then, activations are quantised
            asymmetrically, and what is large in them is moved into the weights (SmoothQuant).
    """
    preset = nncf.QuantizationPreset
    with quiet("nncf"), kept_signal_stack():
        dataset = nncf.Dataset([image.numpy() for image in images[:MAX_IMAGES].split(1)])
        return nncf.quantize(
            network,
            dataset,
            preset=preset.MIXED if transformer else preset.PERFORMANCE,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=min(len(images), MAX_IMAGES),
        )


def quantize_onnx(source: Path, path: Path) -> None:
    """Write an ONNX file with int8 weights in the products of matrices; activations get one scale for each call.

    Convolutions stay float: ONNX Runtime computes them in int8 without the kernels that make it fast.
    """
    quantization = importlib.import_module("onnxruntime.quantization")
    # The root logger is told to prepare the model first, which the exporter has done.
    with quiet(None):
        quantization.quantize_dynamic(
            source, path, op_types_to_quantize=["MatMul"], weight_type=quantization.QuantType.QInt8
        )


def has_attention(model: nn.Module) -> bool:
    """Return whether a model is a transformer, by the names of its modules' classes."""
    return any("attention" in type(module).__name__.lower() for module in model.modules())


@contextlib.contextmanager
def quiet(name: str | None) -> Iterator[None]:
    """Silence what a logger (the root if None) says below an error, and all that is printed, such as bars."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
