"""The ways in which a benchmark runs a model: in PyTorch, dense and sparse, and in other runtimes."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.extras import need
from cap_hf.inference.example import Inputs
from cap_hf.inference.export import ONNX_NAME, prepare, write_checked
from cap_hf.inference.optimize import optimize_for_inference, resident_bytes
from cap_hf.towers import MainOutput

# From what the model takes to logits `(batch, labels)`, or what else it is called for.
Call = Callable[[Inputs], torch.Tensor]


class Backend:
    """A model that is made ready in one way; `start` is called for every batch size and number of threads.

    Args:
        model: left as it is.
        example: two images, as the model takes them.
    """

    def __init__(self, model: PreTrainedModel, example: Inputs) -> None:
        self.model = model

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

    def __init__(self, model: PreTrainedModel, example: Inputs) -> None:
        super().__init__(copy.deepcopy(model).bfloat16(), example)

    def start(self, threads: int) -> Call:
        call = super().start(threads)
        return lambda inputs: call(inputs | {"pixel_values": inputs["pixel_values"].to(torch.bfloat16)}).float()


class Sparse(Backend):
    """The model after `optimize_for_inference`, which chooses layers for images of the size that is measured."""

    def __init__(self, model: PreTrainedModel, example: Inputs) -> None:
        single = {name: value[:1] for name, value in example.items()}
        super().__init__(optimize_for_inference(copy.deepcopy(model), example_inputs=single), example)


class SparseCompiled(Sparse):
    """The model after `optimize_for_inference`, through torch.compile."""

    start = DenseCompiled.start


class ONNXRuntime(Backend):
    """ONNX Runtime on the exported dense model, float32, for images of one size."""

    def __init__(self, model: PreTrainedModel, example: Inputs) -> None:
        super().__init__(model, example)
        self.runtime = prepare(model)
        self.folder = TemporaryFolder()
        self.path = Path(self.folder.name) / ONNX_NAME
        write_checked(self.runtime, model, example, self.path)

    def start(self, threads: int) -> Call:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Between two calls its threads would spin on, and take a core from what is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self.runtime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        return lambda inputs: torch.from_numpy(session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})[0])

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.parent.glob(f"{ONNX_NAME}*"))


class OpenVINO(ONNXRuntime):
    """OpenVINO on the same ONNX file, float32."""

    def __init__(self, model: PreTrainedModel, example: Inputs) -> None:
        self.openvino = need("openvino", "export")
        super().__init__(model, example)

    def start(self, threads: int) -> Call:
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        compiled = self.openvino.Core().compile_model(str(self.path), "CPU", settings)
        return lambda inputs: torch.from_numpy(np.array(compiled([inputs["pixel_values"].numpy()])[0]))


BACKENDS: dict[str, type[Backend]] = {
    "dense": Dense,
    "dense_compile": DenseCompiled,
    "dense_bf16": DenseBFloat16,
    "sparse": Sparse,
    "sparse_compile": SparseCompiled,
    "onnxruntime": ONNXRuntime,
    "openvino": OpenVINO,
}
