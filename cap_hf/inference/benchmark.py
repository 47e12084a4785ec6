"""Measure how fast a model runs, dense and sparse, in PyTorch and in other runtimes, side by side in one run."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.errors import CAPError, reason
from cap_hf.extras import need
from cap_hf.inference.choice import time_in_turns
from cap_hf.inference.export import ONNX_NAME, export_onnx
from cap_hf.inference.optimize import make_example, optimize_for_inference, resident_bytes
from cap_hf.models import usable_of_transformers
from cap_hf.towers import MainOutput

# Seconds before each run: threads of the runtime that ran before may still spin, and would take a core.
PAUSE = 0.02
# From pixels `(batch, channels, height, width)` to logits `(batch, labels)`, or what else the model is called for.
Call = Callable[[torch.Tensor], Any]


@dataclass
class Measurement:
    """One backend at one batch size and number of threads.

    Attributes:
        seconds, low_seconds, high_seconds: per batch: median and quartiles.
        weight_bytes: of all weights as the backend holds them; an ONNX runtime may repack what is in the file.
        max_difference: largest difference of its output from the dense model's, relative to the largest entry of that.
        speedup: over the backend `dense` at the same batch size and threads.
    """

    backend: str
    batch_size: int
    threads: int
    seconds: float
    low_seconds: float
    high_seconds: float
    images_per_second: float
    weight_bytes: int
    max_difference: float
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes, for a JSON file."""
        return asdict(self)


class Backend:
    """A model that is made ready in one way; `start` is called for every batch size and number of threads."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def start(self, threads: int) -> Call:
        """Return the call to measure; the caller has set PyTorch's number of threads."""
        return MainOutput(self.model)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights as this backend holds them."""
        return resident_bytes(self.model)


class Dense(Backend):
    """The model as it is, in PyTorch, one operator after the other."""


class DenseCompiled(Backend):
    """The model through torch.compile."""

    def start(self, threads: int) -> Call:
        return torch.compile(MainOutput(self.model), dynamic=False)


class DenseBFloat16(Backend):
    """The model in PyTorch with weights and activations in bfloat16."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(copy.deepcopy(model).bfloat16())

    def start(self, threads: int) -> Call:
        call = super().start(threads)
        return lambda pixels: call(pixels.to(torch.bfloat16)).float()


class Sparse(Backend):
    """The model after `optimize_for_inference`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(optimize_for_inference(copy.deepcopy(model)))


class SparseCompiled(Sparse):
    """The model after `optimize_for_inference`, through torch.compile."""

    start = DenseCompiled.start


class ONNXRuntime(Backend):
    """ONNX Runtime on the exported dense model, float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.runtime = need("onnxruntime", "export")
        self.folder = TemporaryFolder()
        self.path = export_onnx(model, Path(self.folder.name) / "onnx")

    def start(self, threads: int) -> Call:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Between two calls its threads would spin on, and take a core from what is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self.runtime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.parent.glob(f"{ONNX_NAME}*"))


class OpenVINO(ONNXRuntime):
    """OpenVINO on the same ONNX file, float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.openvino = need("openvino", "export")
        super().__init__(model)

    def start(self, threads: int) -> Call:
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        compiled = self.openvino.Core().compile_model(str(self.path), "CPU", settings)
        return lambda pixels: torch.from_numpy(np.array(compiled([pixels.numpy()])[0]))


BACKENDS: dict[str, type[Backend]] = {
    "dense": Dense,
    "dense_compile": DenseCompiled,
    "dense_bf16": DenseBFloat16,
    "sparse": Sparse,
    "sparse_compile": SparseCompiled,
    "onnxruntime": ONNXRuntime,
    "openvino": OpenVINO,
}


def benchmark(
    model: PreTrainedModel,
    backends: list[str],
    batch_sizes: list[int],
    threads: list[int],
    runs: int = 15,
    seconds: float = float("inf"),
    progress: Callable[[str], object] = lambda text: None,
    measured: Callable[[list[Measurement]], object] = lambda found: None,
) -> tuple[list[Measurement], dict[str, str]]:
    """Measure backends in turns on random images of the size in the model's config, on the CPU.

    Args:
        model: dense or pruned, in float32; left as it is.
        backends: names in `BACKENDS`; `dense` is always measured.
        threads: numbers of threads within an operator.
        runs: turns of each setting.
        seconds: end a setting earlier after this long, with three turns at least.
        progress: told what is done next.
        measured: told what was measured in a setting, as soon as it is.

    Returns:
        What was measured, and the reason why each of the other backends was not, by name.

    Raises:
        CAPError: there is no backend of some name, or the model cannot be used as it is, see
            `cap_hf.models.usable_of_transformers`.
    """
    names = list(dict.fromkeys(["dense", *backends]))
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise CAPError(f"backend {unknown[0]!r} is none of {', '.join(BACKENDS)}")
    model = usable_of_transformers(model)
    ready: dict[str, Backend] = {}
    missing: dict[str, str] = {}
    for name in names:
        progress(f"preparing {name}")
        try:
            ready[name] = BACKENDS[name](model)
        except CAPError as error:
            missing[name] = str(error)
    found: list[Measurement] = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for size in batch_sizes:
                progress(f"batch {size}, {count} threads")
                pixels = make_example(model, size)["pixel_values"]
                setting = measure(ready, missing, pixels, count, runs, seconds)
                measured(setting)
                found += setting
    finally:
        torch.set_num_threads(before)
    return found, missing


@torch.inference_mode()
def measure(
    ready: dict[str, Backend],
    missing: dict[str, str],
    pixels: torch.Tensor,
    threads: int,
    runs: int,
    seconds: float,
) -> list[Measurement]:
    """Measure one batch size and number of threads; a backend that fails goes to `missing` with the reason."""
    calls: dict[str, Call] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, backend in ready.items():
        if name in missing:
            continue
        try:
            call = backend.start(threads)
            outputs[name] = call(pixels)
        except Exception as error:  # whatever a compiler or another runtime may do
            missing[name] = f"failed: {reason(error)}"
            continue
        calls[name] = call
    times = time_in_turns([partial(call, pixels) for call in calls.values()], runs, seconds, pause=PAUSE)
    medians = {name: statistics.median(taken) for name, taken in zip(calls, times, strict=True)}
    largest = outputs["dense"].abs().max().item()
    found = []
    for name, taken in zip(calls, times, strict=True):
        low, _, high = statistics.quantiles(taken, n=4)
        found.append(
            Measurement(
                backend=name,
                batch_size=len(pixels),
                threads=threads,
                seconds=medians[name],
                low_seconds=low,
                high_seconds=high,
                images_per_second=len(pixels) / medians[name],
                weight_bytes=ready[name].weight_bytes,
                max_difference=(outputs[name] - outputs["dense"]).abs().max().item() / largest,
                speedup=medians["dense"] / medians[name],
            )
        )
    return found


def losses(found: list[Measurement]) -> list[str]:
    """Return a line for every setting in which something dense was faster than the fastest sparse backend."""
    lines = []
    for size, threads in dict.fromkeys((each.batch_size, each.threads) for each in found):
        here = [each for each in found if (each.batch_size, each.threads) == (size, threads)]
        sparse = min((each for each in here if "sparse" in each.backend), key=lambda each: each.seconds, default=None)
        if sparse is None:
            continue
        faster = [each for each in here if "sparse" not in each.backend and each.seconds < sparse.seconds]
        lines += [
            f"batch {size}, {threads} threads: sparse loses to {each.backend}, "
            f"which is {sparse.seconds / each.seconds:.2f} times as fast"
            for each in sorted(faster, key=lambda each: each.seconds)
        ]
    return lines
