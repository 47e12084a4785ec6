"""What a page uses of the files that runs write: names and types, which `check_types` holds them to."""

from typing import TypedDict

from cap_hf.checkpoints.folder import PruningFacts, Report
from cap_hf.checkpoints.metrics import Measured


class Layer(TypedDict, total=False):
    """What a page says of one target."""

    name: str
    num_weights: int
    num_zeros: int
    loss: float | None


class Pruning(PruningFacts, total=False):
    """What a page says of a pruning; `layers` is checked as `Layer`."""

    method: str
    allocation: str
    pattern: str | None
    requested_sparsity: float | None
    sparsity: float


class Result(TypedDict, total=False):
    """One model of a run."""

    checkpoint: str
    sparse: Measured | None
    recovered: Measured | None
    pruning: Pruning | None
    healing: dict | None
    steps: list[float] | None


class Phase(TypedDict, total=False):
    """What a page says of one phase of a run."""

    phase: str
    seconds: float
    peak_memory_bytes: dict[str, int]


class Evaluation(TypedDict, total=False):
    """One model of a search, as it was measured on held-out images."""

    sparsity: float
    drop: float
    drop_se: float | None


class Search(TypedDict, total=False):
    """A search for the highest sparsity that loses no more than `max_drop` of a metric."""

    metric: str
    max_drop: float
    evaluations: list[Evaluation]


class Facts(Report, total=False):
    """The entries of a report.json that a page needs beyond those of a checkpoint's."""

    phases: list[Phase] | None
    log_history: list[dict] | None
    search: Search | None
    sparsity: float | None
    sparsity_dense: float | None
    sparsity_before: float | None
    started: str | None


class Benchmark(TypedDict, total=False):
    """The entries of a benchmark.json that a page needs."""

    model_name_or_path: str
    sparsity: float
    measurements: list[dict]


class Curve(TypedDict, total=False):
    """As `removal_curve` returns it."""

    sparsity: list[float]
    marginal: list[float]
    total: list[float]
    layers: dict[str, list[float]]


class Record(TypedDict, total=False):
    """What a run has noted down for its page."""

    report_sha256: str
    command: str | None
    curve: Curve | None
    spectra: list[dict]
    changed: dict[str, dict]
    absent: list[str]
