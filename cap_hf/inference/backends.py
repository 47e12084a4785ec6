"""The ways in which a benchmark runs a model: in PyTorch, dense and sparse, and in other runtimes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.errors import CAPError
from cap_hf.extras import need
from cap_hf.inference.example import Inputs
from cap_hf.inference.export import ONNX_NAME, prepare, write_checked
from cap_hf.inference.linear import resident_bytes
from cap_hf.inference.optimize import optimize_for_inference
from cap_hf.inference.post_training import has_attention, quantize_onnx, quantize_openvino
from cap_hf.inference.runtimes import kept_signal_stack, need_nncf, need_onnxruntime
from cap_hf.towers import MainOutput

# From what the model takes to logits `(batch, labels)`, or what else it is called for.
Call = Callable[[Inputs], torch.Tensor]


class Subject:
    """The model that backends are made of, images, and its ONNX file, which is written once for all that read it.

    Args:
        model: left as it is.
        images: two or more, as the model takes them; int8 is calibrated on them.
    """

    def __init__(self, model: PreTrainedModel, images: Inputs) -> None:
        self.model = model
        self.images = images
        self._folder: TemporaryFolder | None = None
        self._failed: CAPError | None = None

    def first(self, count: int) -> Inputs:
        """Return the first images."""
        return {name: value[:count] for name, value in self.images.items()}

    def onnx(self) -> Path:
        """Return the path of the model's ONNX file, float32, for images of one size.

        Raises:
            CAPError: as of `export_onnx`; the same at each call, without trying again.
        """
        if self._failed is not None:
            raise self._failed
        if self._folder is None:
            folder = TemporaryFolder()
            try:
                write_checked(prepare(self.model), self.model, self.first(2), Path(folder.name) / ONNX_NAME)
            except CAPError as error:
                self._failed = error
                raise
            self._folder = folder
        return Path(self._folder.name) / ONNX_NAME


class Backend:
    """A model that is made ready in one way; `start` is called for every batch size and number of threads.

    Args:
        subject: the model and images; both are left as they are.
    """

    def __init__(self, subject: Subject) -> None:
        self.model = subject.model

    def start(self, threads: int) -> Call:
        """Return the call to measure; the caller has set PyTorch's number of threads."""
        output = MainOutput(self.model)
        return lambda inputs: output(**inputs)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights as this backend holds them."""
        return resident_bytes(self.model)


class Dense(Backend):
    """The model as it is, in PyTorch, one operator after the other."""


class DenseCompiled(Backend):
    """The model through torch.compile."""

    def start(self, threads: int) -> Call:
        compiled = torch.compile(MainOutput(self.model), dynamic=False)
        return lambda inputs: compiled(**inputs)


class DenseBFloat16(Backend):
    """The model in PyTorch with weights and activations in bfloat16."""

    def __init__(self, subject: Subject) -> None:
        self.model = copy.deepcopy(subject.model).bfloat16()

    def start(self, threads: int) -> Call:
        call = super().start(threads)
        return lambda inputs: call(inputs | {"pixel_values": inputs["pixel_values"].to(torch.bfloat16)}).float()


class Sparse(Backend):
    """The model after `optimize_for_inference`, which chooses layers for images of the size that is measured."""

    def __init__(self, subject: Subject) -> None:
        self.model = optimize_for_inference(copy.deepcopy(subject.model), example_inputs=subject.first(1))


class SparseInt8(Backend):
    """The model after `optimize_for_inference` in int8, weights and activations of the layers that it chooses."""

    def __init__(self, subject: Subject) -> None:
        model = copy.deepcopy(subject.model)
        self.model = optimize_for_inference(model, example_inputs=subject.first(1), dtype="int8")


class SparseCompiled(Sparse):
    """The model after `optimize_for_inference`, through torch.compile."""

    start = DenseCompiled.start


class SparseInt8Compiled(SparseInt8):
    """The model after `optimize_for_inference` in int8, through torch.compile."""

    start = DenseCompiled.start


class ONNXRuntime(Backend):
    """ONNX Runtime on the exported dense model, float32, for images of one size."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.runtime = need_onnxruntime()
        self.subject = subject  # whose file goes with it
        self.path = subject.onnx()

    def start(self, threads: int) -> Call:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Between two calls its threads would spin on, and take a core from what is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self.runtime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        return lambda inputs: torch.from_numpy(session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})[0])

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.parent.glob(f"{self.path.stem}.*"))


class ONNXRuntimeInt8(ONNXRuntime):
    """ONNX Runtime on the same file after its dynamic quantization to int8."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.folder = TemporaryFolder()
        self.path = Path(self.folder.name) / ONNX_NAME
        quantize_onnx(subject.onnx(), self.path)


class OpenVINO(ONNXRuntime):
    """OpenVINO on the same ONNX file, float32."""

    # What it computes in.
    hint: str | None = "f32"

    def __init__(self, subject: Subject) -> None:
        self.core = need("openvino", "export").Core()
        super().__init__(subject)

    def start(self, threads: int) -> Call:
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if self.hint is not None:
            settings["INFERENCE_PRECISION_HINT"] = self.hint
        with kept_signal_stack():
            compiled = self.core.compile_model(str(self.path), "CPU", settings)
        return lambda inputs: torch.from_numpy(np.array(compiled([inputs["pixel_values"].numpy()])[0]))


class OpenVINOBFloat16(OpenVINO):
    """OpenVINO on the same ONNX file in bfloat16, on a processor that computes in it."""

    hint = "bf16"

    def __init__(self, subject: Subject) -> None:
        core = need("openvino", "export").Core()
        if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise CAPError("this processor has no instructions for bfloat16 (AVX-512 BF16 or AMX)")
        super().__init__(subject)


class OpenVINOInt8(OpenVINO):
    """OpenVINO after post-training quantization to int8; what stays float is in the precision that it chooses."""

    # None lets OpenVINO choose. Of a processor that is held to AVX2 it would choose bfloat16 all the same, and fail.
    hint = "f32" if torch.backends.cpu.get_cpu_capability() == "AVX2" else None

    def __init__(self, subject: Subject) -> None:
        openvino, nncf = need("openvino", "export"), need_nncf()
        super().__init__(subject)
        network = self.core.read_model(str(self.path))
        pixels = subject.images["pixel_values"]
        network = quantize_openvino(nncf, network, pixels, has_attention(subject.model))
        self.folder = TemporaryFolder()
        self.path = Path(self.folder.name) / "model.xml"
        openvino.save_model(network, str(self.path), compress_to_fp16=False)


BACKENDS: dict[str, type[Backend]] = {
    "dense": Dense,
    "dense_compile": DenseCompiled,
    "dense_bf16": DenseBFloat16,
    "sparse": Sparse,
    "sparse_int8": SparseInt8,
    "sparse_compile": SparseCompiled,
    "sparse_int8_compile": SparseInt8Compiled,
    "onnxruntime": ONNXRuntime,
    "onnxruntime_int8": ONNXRuntimeInt8,
    "openvino": OpenVINO,
    "openvino_bf16": OpenVINOBFloat16,
    "openvino_int8": OpenVINOInt8,
}
