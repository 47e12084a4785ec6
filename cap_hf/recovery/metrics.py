"""What the Trainer measures when it evaluates while it trains."""

import torch
from transformers import EvalPrediction

from cap_hf.data.evaluation import ImageClassificationMetric
from cap_hf.errors import CAPError


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return top-1 and, with 5 classes or more, top-5 accuracy, each in [0, 1]; the Trainer adds the loss."""
    metric = ImageClassificationMetric(keep_in_memory=True)
    results = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
    return {name: results[name] for name in ("top1", "top5") if name in results}


def check_metric(name: str | None, num_labels: int) -> None:
    """Raise a CAPError if the metric that the best checkpoint is to have is none that evaluations measure.

    Args:
        name: with `eval_` before it or without; None for no metric.
        num_labels: classes of the model; 0 where there are none, or no labels, and only a loss is measured.
    """
    measured = ["loss", *(["top1"] if num_labels else []), *(["top5"] if num_labels >= 5 else [])]
    if name is not None and name.removeprefix("eval_") not in measured:
        raise CAPError(f"--metric_for_best_model {name} is not one of {', '.join(measured)}")


def first_logits(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return the logits alone, `(b, classes)`, of a model that returns more."""
    return logits[0] if isinstance(logits, tuple) else logits
