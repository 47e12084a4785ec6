"""What is measured of a model: the figures of a report by their names, and how tables and cards show them.

Imports nothing heavy, so that a command can name them before torch is there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict


class Measured(TypedDict, total=False):
    """What `AccuracyEvaluation` and `FeatureEvaluation` measure: shares in [0, 1], the loss in nats.

    `_se` is the standard error of a figure over the images, `_drop_se` that of its difference to the dense model's.
    """

    top1: float
    top1_se: float
    top1_drop_se: float
    top5: float
    top5_se: float
    top5_drop_se: float
    loss: float
    loss_se: float
    loss_drop_se: float
    knn_top1: float
    knn_top1_se: float
    knn_top1_drop_se: float
    linear_top1: float
    linear_top1_se: float
    linear_top1_drop_se: float
    cosine: float
    cosine_se: float
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

    def show(self, measured: Mapping[str, Any] | None, error: bool = True) -> str:
        """Return the figure as tables and cards have it, with its standard error if wanted and known; `-` if none."""
        measured = measured or {}
        return self._format(measured.get(self.key), measured.get(f"{self.key}_se") if error else None)

    def show_drop(self, measured: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> str:
        """Return likewise how much of the figure is lost to the dense model; `-` for that one itself."""
        value, whole = ((each or {}).get(self.key) for each in (measured, dense))
        if measured is dense or measured is None or value is None or whole is None:
            return "-"
        return self._format(whole - value, measured.get(f"{self.key}_drop_se"))

    def _format(self, value: float | None, error: float | None) -> str:
        if value is None:
            return "-"
        scale, digits = (100, 2) if self.share else (1, 4)
        return " ± ".join(f"{scale * each:.{digits}f}" for each in (value, error) if each is not None)


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
