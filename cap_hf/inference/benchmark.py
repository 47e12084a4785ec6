"""Measure how fast a model runs, dense and sparse, in PyTorch and in other runtimes, side by side in one run."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from cap_hf.errors import CAPError, reason
from cap_hf.inference.backends import BACKENDS, Backend, Call
from cap_hf.inference.choice import time_in_turns
from cap_hf.inference.example import Inputs, make_example, size_of
from cap_hf.models import usable_of_transformers
from cap_hf.outputs import main_output
from cap_hf.towers import see

# Seconds before each run: threads of the runtime that ran before may still spin, and would take a core.
PAUSE = 0.02


@dataclass
class Measurement:
    """One backend at one batch size and number of threads.

    Attributes:
        seconds, low_seconds, high_seconds: per batch: median and quartiles.
        weight_bytes: of all weights as the backend holds them; an ONNX runtime may repack what is in the file.
        max_difference: largest difference of its output from the dense model's, relative to the largest entry of that.
        image_size: height and width of the images, in pixels.
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
    image_size: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes, for a JSON file."""
        return asdict(self)


def benchmark(
    model: PreTrainedModel,
    backends: list[str],
    batch_sizes: list[int],
    threads: list[int],
    runs: int = 15,
    seconds: float = float("inf"),
    progress: Callable[[str], object] = lambda text: None,
    measured: Callable[[list[Measurement]], object] = lambda found: None,
    image_processor: BaseImageProcessor | None = None,
    image_size: int | Sequence[int] | None = None,
) -> tuple[list[Measurement], dict[str, str]]:
    """Measure backends in turns on random images of the size that the model is used with, on the CPU.

    Args:
        model: dense or pruned, in float32; left as it is.
        backends: names in `BACKENDS`; `dense` is always measured.
        threads: numbers of threads within an operator.
        runs: turns of each setting.
        seconds: end a setting earlier after this long, with three turns at least.
        progress: told what is done next.
        measured: told what was measured in a setting, as soon as it is.
        image_processor: that decides the size of the images; default: the one beside the checkpoint that the model was
            loaded from, if it is on this machine.
        image_size: height and width, or one number for both, in the place of what the image processor says. Where there
            is neither, the config says it.

    Returns:
        What was measured, and the reason why each of the other backends was not, by name.

    Raises:
        CAPError: there is no backend of some name, the model cannot be used as it is, see
            `cap_hf.models.usable_of_transformers`, or is not on the CPU, or it fails on images of this size, gives no
            finite numbers for them, or fails with each size of a batch.
    """
    names = list(dict.fromkeys(["dense", *backends]))
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise CAPError(f"backend {unknown[0]!r} is none of {', '.join(BACKENDS)}")
    model = usable_of_transformers(model).eval()
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise CAPError(f"{type(model).__name__} is not on the CPU, where it would be measured: model.cpu()")
    example = make_example(model, 2, image_processor, image_size)
    with torch.inference_mode():
        if not main_output(see(model, example))[1].isfinite().all():
            raise CAPError(f"{type(model).__name__} gives numbers that are not finite for random images")
    ready: dict[str, Backend] = {}
    missing: dict[str, str] = {}
    for name in names:
        progress(f"preparing {name}")
        try:
            ready[name] = BACKENDS[name](model, example)
        except CAPError as error:
            missing[name] = reason(error)
        except Exception as error:  # whatever an exporter may do, or a full disk
            missing[name] = f"failed: {reason(error)}"
    found: list[Measurement] = []
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for size in batch_sizes:
                progress(f"batch {size}, {count} threads")
                inputs = make_example(model, size, image_processor, image_size)
                setting = [] if "dense" in missing else measure(ready, missing, inputs, count, runs, seconds)
                measured(setting)
                found += setting
    finally:
        torch.set_num_threads(before)
    if not found:
        raise CAPError(f"{type(model).__name__} cannot be measured in PyTorch: {missing['dense']}")
    return found, missing


@torch.inference_mode()
def measure(
    ready: dict[str, Backend],
    missing: dict[str, str],
    inputs: Inputs,
    threads: int,
    runs: int,
    seconds: float,
) -> list[Measurement]:
    """Measure one batch size and number of threads; a backend that fails goes to `missing` with the reason.

    Where the dense model fails, perhaps because a batch is too large, there is nothing to compare with, and no result.
    """
    calls: dict[str, Call] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, backend in ready.items():
        if name in missing:
            continue
        try:
            call = backend.start(threads)
            outputs[name] = call(inputs)
            if not outputs[name].isfinite().all():
                raise CAPError("it gives numbers that are not finite")
        except Exception as error:  # whatever a compiler or another runtime may do
            missing[name] = f"failed: {reason(error)}"
            continue
        calls[name] = call
    if "dense" in missing:
        return []
    times = time_in_turns([partial(call, inputs) for call in calls.values()], runs, seconds, pause=PAUSE)
    medians = {name: statistics.median(taken) for name, taken in zip(calls, times, strict=True)}
    # Of outputs that are all 0 there is no relative difference.
    largest = outputs["dense"].abs().max().item() or 1.0
    batch_size, size = len(inputs["pixel_values"]), size_of(ready["dense"].model, inputs)
    found = []
    for name, taken in zip(calls, times, strict=True):
        low, _, high = statistics.quantiles(taken, n=4)
        found.append(
            Measurement(
                backend=name,
                batch_size=batch_size,
                threads=threads,
                seconds=medians[name],
                low_seconds=low,
                high_seconds=high,
                images_per_second=batch_size / medians[name],
                weight_bytes=ready[name].weight_bytes,
                max_difference=(outputs[name] - outputs["dense"]).abs().max().item() / largest,
                speedup=medians["dense"] / medians[name],
                image_size=size,
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
