"""What is measured of a model: the figures of a report by their names, and how tables and cards show them.

Imports nothing heavy, so that a command can name them before torch is there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict


class Measured(TypedDict, total=False):
    """What `evaluate_model` and `FeatureEvaluation` measure: shares in [0, 1], the loss in nats."""

    top1: float
    top5: float
    loss: float
    knn_top1: float
    knn_top1_se: float
    knn_top1_drop_se: float
    linear_top1: float
    linear_top1_se: float
    linear_top1_drop_se: float
    cosine: float
    cosine_p5: float
    patch_error: float
    bank_examples: int
    num_examples: int


Key = Literal["top1", "top5", "loss", "knn_top1", "linear_top1", "cosine", "cosine_p5", "patch_error"]


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        key: in a report.
        name: in a card.
        heading: of its column in a table.
        share: whether it is shown as per cent.
        accuracy: what it is called among the results on the Hub, where it is an accuracy.
        drop: whether a table also says how much of it is lost.
    """

    key: Key
    name: str
    heading: str
    share: bool = False
    accuracy: str | None = None
    drop: bool = False

    def show(self, value: float | None) -> str:
        """Return the figure as tables and cards have it; None is `-`."""
        if value is None:
            return "-"
        return f"{100 * value:.2f}" if self.share else f"{value:.4f}"


METRICS = (
    Metric("top1", "top-1 accuracy %", "top-1 %", True, "Top-1 accuracy", True),
    Metric("top5", "top-5 accuracy %", "top-5 %", True, "Top-5 accuracy"),
    Metric("loss", "cross entropy", "loss"),
    Metric("knn_top1", "k-NN top-1 accuracy %", "k-NN %", True, "k-NN top-1 accuracy", True),
    Metric("linear_top1", "linear probe, top-1 accuracy %", "linear %", True, "Linear probe top-1 accuracy"),
    Metric("cosine", "cosine of an image's feature to the dense model's, mean", "cosine"),
    Metric("cosine_p5", "the same, 5th percentile", "5th pct"),
    Metric("patch_error", "relative squared error of the patch tokens", "patch error"),
)


def measured_in(results: Iterable[Mapping[str, Any] | None]) -> list[Metric]:
    """Return the metrics that any of some results has, in their order."""
    keys = {key for each in results for key in each or ()}
    return [metric for metric in METRICS if metric.key in keys]
