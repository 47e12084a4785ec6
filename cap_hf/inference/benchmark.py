"""Measure how fast a model runs, dense and sparse, in PyTorch and in other runtimes, side by side in one run."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from cap_hf.errors import CAPError, reason
from cap_hf.inference.backends import BACKENDS, Backend, Call, Subject
from cap_hf.inference.choice import time_in_turns
from cap_hf.inference.example import Inputs, make_example, size_of
from cap_hf.models import usable_of_transformers
from cap_hf.outputs import main_output
from cap_hf.towers import see

# Random images, in the place of ones that are given, that int8 is calibrated on and outputs are compared on.
RANDOM_IMAGES = 16
# Of the largest output: what float32 sums in another order may differ by, and what is rounded further does.
ROUNDING = 1e-3
# Seconds before each run: threads of the runtime that ran before may still spin, and would take a core.
PAUSE = 0.02


@dataclass
class Measurement:
    """One backend at one batch size and number of threads.

    Attributes:
        seconds, low_seconds, high_seconds: per batch: median and quartiles.
        weight_bytes: of all weights as the backend holds them; an ONNX runtime may repack what is in the file.
        max_difference: largest difference of its output from the dense model's, relative to the largest entry of that,
            over all images that are compared.
        same_top1: share of these images with the largest logit where the dense model has it; None without a head.
        images: how many are compared.
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
    same_top1: float | None = None
    images: int = 0

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
    images: Inputs | None = None,
) -> tuple[list[Measurement], dict[str, str]]:
    """Measure backends in turns on images of the size that the model is used with, on the CPU.

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
        images: as the model takes them, two or more, which int8 is calibrated on, outputs are compared on, and batches
            are made of; default: random ones. Speed does not depend on what they show, and how int8 rounds does.

    Returns:
        What was measured, and the reason why each of the other backends was not, by name.

    Raises:
        CAPError: there is no backend of some name, the model cannot be used as it is, see
            `cap_hf.models.usable_of_transformers`, or is not on the CPU, or it fails on images of this size, gives no
            finite numbers for them, or fails with each size of a batch; or there are fewer than two images.
    """
    names = list(dict.fromkeys(["dense", *backends]))
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise CAPError(f"backend {unknown[0]!r} is none of {', '.join(BACKENDS)}")
    model = usable_of_transformers(model).eval()
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise CAPError(f"{type(model).__name__} is not on the CPU, where it would be measured: model.cpu()")
    images = make_example(model, RANDOM_IMAGES, image_processor, image_size) if images is None else images
    if len(images["pixel_values"]) < 2:
        raise CAPError("one image is too few to compare outputs on: give two or more")
    subject = Subject(model, images)
    with torch.inference_mode():
        kind, output = main_output(see(model, subject.first(2)))
        if not output.isfinite().all():
            raise CAPError(f"{type(model).__name__} gives numbers that are not finite for the images")
    ready: dict[str, Backend] = {}
    missing: dict[str, str] = {}
    for name in names:
        progress(f"preparing {name}")
        try:
            ready[name] = BACKENDS[name](subject)
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
                if "dense" in missing:
                    break
                setting = measure(ready, missing, images, size, count, runs, seconds, kind == "logits")
                measured(setting)
                found += setting
    finally:
        torch.set_num_threads(before)
    if not found:
        raise CAPError(f"{type(model).__name__} cannot be measured in PyTorch: {missing['dense']}")
    return found, missing


def make_batches(images: Inputs, size: int) -> list[Inputs]:
    """Return full batches that have each image at least once; those at the front come again in the last one."""
    count = len(images["pixel_values"])
    places = [[place % count for place in range(start, start + size)] for start in range(0, count, size)]
    return [{name: value[batch] for name, value in images.items()} for batch in places]


@torch.inference_mode()
def measure(
    ready: dict[str, Backend],
    missing: dict[str, str],
    images: Inputs,
    batch_size: int,
    threads: int,
    runs: int,
    seconds: float,
    has_head: bool,
) -> list[Measurement]:
    """Measure one batch size and number of threads; a backend that fails goes to `missing` with the reason.

    Where the dense model fails, perhaps because a batch is too large, there is nothing to compare with, and no result.

    Args:
        ready: backends by name.
        missing: those that have failed, which are left out.
        images: outputs are compared on all of them, and time is taken on the first batch.
        batch_size: images of a batch.
        threads: as PyTorch has been told.
        runs, seconds: as of `benchmark`.
        has_head: whether outputs are logits.
    """
    batches, count = make_batches(images, batch_size), len(images["pixel_values"])
    calls: dict[str, Call] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, backend in ready.items():
        if name in missing:
            continue
        try:
            call = backend.start(threads)
            outputs[name] = torch.cat([call(inputs) for inputs in batches])[:count]
            if not outputs[name].isfinite().all():
                raise CAPError("it gives numbers that are not finite")
        except Exception as error:  # whatever a compiler or another runtime may do
            missing[name] = f"failed: {reason(error)}"
            continue
        calls[name] = call
    if "dense" in missing:
        return []
    times = time_in_turns([partial(call, batches[0]) for call in calls.values()], runs, seconds, pause=PAUSE, warm=True)
    medians = {name: statistics.median(taken) for name, taken in zip(calls, times, strict=True)}
    size = size_of(ready["dense"].model, images)
    found = []
    for name, taken in zip(calls, times, strict=True):
        low, _, high = statistics.quantiles(taken, n=4)
        max_difference, same = compare(outputs[name], outputs["dense"])
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
                max_difference=max_difference,
                speedup=medians["dense"] / medians[name],
                image_size=size,
                same_top1=same if has_head else None,
                images=count,
            )
        )
    return found


def compare(output: torch.Tensor, dense: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference of two outputs `(n, ..., labels)`, and the share whose largest entry is the same.

    The difference is relative to the largest entry of `dense`, or absolute where that is 0.
    """
    largest = dense.abs().max().item() or 1.0
    same = (output.argmax(-1) == dense.argmax(-1)).float().mean().item()
    return (output - dense).abs().max().item() / largest, same


def winners(found: list[Measurement]) -> list[str]:
    """Return a line for every setting that says what is fastest, and what its outputs lose if it is not only rounding.

    Where they do, the fastest whose outputs do not is named as well.
    """
    lines = []
    for size, threads in dict.fromkeys((each.batch_size, each.threads) for each in found):
        here = [each for each in found if (each.batch_size, each.threads) == (size, threads)]
        best = min(here, key=lambda each: each.seconds)
        line = f"batch {size}, {threads} threads: fastest here: {describe(best)}"
        if best.max_difference > ROUNDING:
            exact = min((each for each in here if each.max_difference <= ROUNDING), key=lambda each: each.seconds)
            line += f"; WARNING: its outputs differ from dense by up to {best.max_difference:.1%} of the largest"
            if best.same_top1 is not None:
                line += f" (same top-1 on {round(best.same_top1 * best.images)} of {best.images} images)"
            line += f"; fastest with the outputs of dense: {describe(exact)}"
        lines.append(line)
    return lines


def describe(each: Measurement) -> str:
    """Return a backend with its speed."""
    return each.backend if each.backend == "dense" else f"{each.backend}, {each.speedup:.2f} times dense"


def losses(found: list[Measurement]) -> list[str]:
    """Return a line for all that is dense and was faster than the fastest sparse backend, exact or in int8."""
    lines = []
    settings = dict.fromkeys((each.batch_size, each.threads, "int8" in each.backend) for each in found)
    for size, threads, int8 in settings:
        here = [each for each in found if (each.batch_size, each.threads) == (size, threads)]
        ours = [each for each in here if "sparse" in each.backend and ("int8" in each.backend) == int8]
        if not ours:
            continue
        sparse = min(ours, key=lambda each: each.seconds)
        faster = [each for each in here if "sparse" not in each.backend and each.seconds < sparse.seconds]
        lines += [
            f"batch {size}, {threads} threads: {sparse.backend} loses to {each.backend}, "
            f"which is {sparse.seconds / each.seconds:.2f} times as fast"
            for each in sorted(faster, key=lambda each: each.seconds)
        ]
    return lines
