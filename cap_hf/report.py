"""What a pruning run says of itself: per-layer figures, phases with seconds and peak memory, versions."""

import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

PACKAGES = ("cap_hf", "torch", "transformers", "accelerate", "datasets", "evaluate", "safetensors")


@dataclass
class LayerReport:
    """One target after pruning.

    Attributes:
        name: of the module whose `weight` is the target.
        shape: of the weight.
        num_weights: in the target.
        num_zeros: of them exactly 0.
        mask_digest: changes with the place of any zero, see `describe_masks`.
        zero_blocks: how many 1x2, 1x4 and 1x8 blocks of consecutive inputs are 0 as a whole, see `count_zero_blocks`.
        block_size: weights per Fisher block.
        loss: what the quadratic model says the removal costs, `1/2 d^T F d` for the change d of the weights, in
            units of the training loss (for sparsegpt and wanda: of the squared layer output); None where no F was
            collected. Of the pruning alone: a refit, which comes after it, goes by another measure.
    """

    name: str
    shape: tuple[int, ...]
    num_weights: int
    num_zeros: int
    mask_digest: str
    block_size: int
    loss: float | None
    zero_blocks: dict[str, int] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Return the share of its weights that are 0."""
        return self.num_zeros / self.num_weights


@dataclass
class RefitReport:
    """One `CAPCompressor.refit`.

    Attributes:
        examples: that the layers were refitted to.
        ridge: how strongly the weights were held to the pruned ones, as `CAPConfig.refit_ridge`.
        left_alone: names of the targets that were not refitted.
    """

    examples: int
    ridge: float
    left_alone: list[str] = field(default_factory=list)


@dataclass
class BudgetReport:
    """What came out of a budget.

    Attributes:
        kind: of the budget: flops, bytes, latency or latency-int8.
        requested: share of what the dense model costs.
        achieved: the share that it is: counted, or measured.
        kept: what the pruned model costs.
        dense: what the dense one does.
        counted_in: multiply-adds of one image, bytes, or seconds of one image.
        predicted: of a latency, the share that the times of layers alone, and of the model with none, let expect; None
            of what is counted.
        error: the standard error of a share that was measured.
        threads: of PyTorch, with which it was.
    """

    kind: str
    requested: float
    achieved: float
    kept: float
    dense: float
    counted_in: str
    predicted: float | None = None
    error: float | None = None
    threads: int | None = None


@dataclass
class PruneReport:
    """One `CAPCompressor.prune`: what was asked for and what came out, in total and by layer; and a refit after it."""

    method: str
    allocation: str
    selection: str
    requested_sparsity: float | None
    layers: list[LayerReport] = field(default_factory=list)
    refit: RefitReport | None = None
    pattern: str | None = None
    budget: BudgetReport | None = None

    @property
    def num_weights(self) -> int:
        """Return how many weights all layers have."""
        return sum(layer.num_weights for layer in self.layers)

    @property
    def num_zeros(self) -> int:
        """Return how many of them are 0."""
        return sum(layer.num_zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Return the share of all layers' weights that are 0."""
        return self.num_zeros / self.num_weights

    @property
    def loss(self) -> float | None:
        """Return the sum of the layers' losses; None where no F was collected."""
        losses = [layer.loss for layer in self.layers if layer.loss is not None]
        return sum(losses) if len(losses) == len(self.layers) else None

    def to_dict(self) -> dict:
        """Return totals and layers, for JSON."""
        layers = [asdict(layer) | {"sparsity": layer.sparsity} for layer in self.layers]
        totals = {
            "sparsity": self.sparsity,
            "num_weights": self.num_weights,
            "num_zeros": self.num_zeros,
            "loss": self.loss,
        }
        return asdict(self) | totals | {"layers": layers}


@dataclass
class Evaluated:
    """One sparse model of a search.

    Attributes:
        sparsity: that it was pruned to.
        score: higher is better.
        drop: by how much the dense model scores more.
        drop_se: the standard error of that over the images; None where it is not known.
        kept: whether the drop is allowed.
        seconds: that pruning and measuring took.
    """

    sparsity: float
    score: float
    drop: float
    drop_se: float | None
    kept: bool
    seconds: float

    @property
    def lost(self) -> str:
        """Return the drop with its standard error, for a line."""
        return " ± ".join(f"{each:.4f}" for each in (self.drop, self.drop_se) if each is not None)


@dataclass
class SearchReport:
    """One `CAPCompressor.find_sparsity`.

    Attributes:
        max_drop: that was allowed.
        step: that sparsities are multiples of.
        dense: score of the dense model.
        num_examples: images that every model was scored on; None where the scores did not tell.
        evaluations: in the order in which they were made.
        sparsity: that was found.
        complete: whether the next multiple of the step was tried, or there is none.
        remarks: what should be known of the result, a line each.
        recalibrated: names of the layers whose batch norm was estimated anew.
    """

    max_drop: float
    step: float
    dense: float
    num_examples: int | None = None
    evaluations: list[Evaluated] = field(default_factory=list)
    sparsity: float = 0.0
    complete: bool = False
    remarks: list[str] = field(default_factory=list)
    recalibrated: list[str] = field(default_factory=list)

    @property
    def found(self) -> Evaluated | None:
        """Return what was measured of the sparsity that was found."""
        return next((each for each in self.evaluations if each.sparsity == self.sparsity), None)

    @property
    def refused(self) -> Evaluated | None:
        """Return what was measured of the lowest sparsity that loses too much; None where none does."""
        return min((each for each in self.evaluations if not each.kept), key=lambda each: each.sparsity, default=None)

    def to_dict(self) -> dict:
        """Return everything, for JSON."""
        return asdict(self)


class Phases:
    """Wall seconds and peak memory of the named phases of a run."""

    def __init__(self) -> None:
        self.records: list[dict] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak_memory()
        start = time.perf_counter()
        yield
        self.records.append(
            {"phase": name, "seconds": round(time.perf_counter() - start, 3), "peak_memory_bytes": peak_memory()}
        )


def accelerator_memory() -> ModuleType | None:
    """Return what tells of the memory of the accelerator that this process has, such as `torch.cuda`, if it does."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    module = None if accelerator is None else torch.get_device_module(accelerator)
    return module if hasattr(module, "max_memory_allocated") else None


def reset_peak_memory() -> None:
    """Start a new peak, where the system lets a process do that (Linux, and most accelerators)."""
    memory = accelerator_memory()
    if memory is not None:
        memory.reset_peak_memory_stats()
    with suppress(OSError):  # elsewhere peak_memory answers the peak of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, int]:
    """Return the peak bytes since `reset_peak_memory`: of this process, and of its accelerator by its name, if any."""
    peaks = {}
    try:
        status = Path("/proc/self/status").read_text()
        peaks["cpu"] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        scale = 1 if platform.system() == "Darwin" else 1024
        peaks["cpu"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    memory, accelerator = accelerator_memory(), torch.accelerator.current_accelerator()
    if memory is not None and accelerator is not None:
        peaks[accelerator.type] = memory.max_memory_allocated()
    return peaks


def now() -> str:
    """Return the time in UTC, to the millisecond, as ISO 8601 has it: as texts, later times come after earlier ones."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
