"""Accuracy with `evaluate`, from a metric that ships with the package: nothing is downloaded."""

from collections.abc import Mapping

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from cap_hf.data.standard_errors import drop_errors, summarize
from cap_hf.errors import CAPError
from cap_hf.outputs import logits_of
from cap_hf.towers import see


class ImageClassificationMetric(evaluate.Metric):
    """Top-1 and top-5 accuracy and cross entropy from logits.

    `compute` takes predictions `(n, classes)` logits and references `(n,)` labels, and returns `top1` and `top5` in
    [0, 1] and `loss` in nats, each with its standard error as `_se`, and `num_examples`. With fewer than 5 classes
    `top5` is left out.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy and cross entropy of an image classifier.",
            citation="",
            inputs_description="predictions: logits of each example; references: its label.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _build_data_dir(self) -> str:
        # In memory nothing is written, and there need be no place for it.
        return str(self._data_dir_root if self.keep_in_memory else super()._build_data_dir())

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        return results_of(score(torch.from_numpy(np.asarray(predictions)), torch.from_numpy(np.asarray(references))))


def score(logits: torch.Tensor, labels: torch.Tensor, first: int = 0) -> dict[str, torch.Tensor]:
    """Return of every example whether it is among the first (`top1`) or the first five classes, and its cross entropy.

    Args:
        logits: `(n, classes)`.
        labels: `(n,)`.
        first: number of the first of these examples, for what is said of one.

    Returns:
        `top1` and, of 5 classes or more, `top5`, `(n,)` bool; `loss`, `(n,)` float64 in nats.

    Raises:
        CAPError: a label is none of the classes.
    """
    logits, labels, classes = logits.double(), labels.long(), logits.shape[1]
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        place = int(wrong.int().argmax())
        raise CAPError(
            f"example {first + place} has label {int(labels[place])}, the model has classes 0 to {classes - 1}: leave "
            "examples without a label out"
        )
    own = logits.gather(1, labels[:, None])
    # Equal logits rank in the order of their classes, as argmax has it; one that is not a number is never right.
    earlier = torch.arange(classes) < labels[:, None]
    rank = (~(logits <= own) | ((logits == own) & earlier)).sum(dim=1)
    scores = {"top1": rank == 0, "loss": F.cross_entropy(logits, labels, reduction="none")}
    return scores | ({"top5": rank < 5} if classes >= 5 else {})


def results_of(scores: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the means of what `score` says of all examples, with their standard errors, and how many there are."""
    return summarize(scores) | {"num_examples": len(scores["top1"])}


def score_all(
    model: nn.Module, dataloader: DataLoader, accelerator: Accelerator, disable_tqdm: bool = False
) -> dict[str, torch.Tensor]:
    """Return what `score` says of all examples, shared out between the processes, in the order of the data.

    Arguments and errors are those of `evaluate_model`; the result is the same on every process, and also has the class
    that was `predicted`, `(n,)` int64.
    """
    model.to(accelerator.device)
    training = model.training
    model.eval()
    disable = disable_tqdm or not accelerator.is_main_process
    parts: list[dict[str, torch.Tensor]] = []
    done = 0
    with torch.inference_mode():
        for batch in transformers_logging.tqdm(dataloader, desc="Evaluating", delay=2, disable=disable):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            logits = logits_of(see(model, batch))
            if logits.isnan().any():
                raise CAPError(
                    "the model's logits are NaN: check its weights, its dtype (load it in float32) and the pixel values"
                )
            logits, labels = accelerator.gather_for_metrics((logits.float(), batch["labels"]))
            logits = logits.cpu()
            parts.append(score(logits, labels.cpu(), done) | {"predicted": logits.argmax(dim=1)})
            done += len(labels)
    model.train(training)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluate_model(
    model: nn.Module, dataloader: DataLoader, accelerator: Accelerator, disable_tqdm: bool = False
) -> dict[str, float]:
    """Evaluate an image classifier on all examples, shared out between the processes.

    Args:
        model: returns `.logits` for `pixel_values`.
        dataloader: batches of `pixel_values` and `labels`, prepared by the accelerator.
        accelerator: from accelerate.
        disable_tqdm: no progress bar.

    Returns:
        What `ImageClassificationMetric` computes, on every process.

    Raises:
        CAPError: the model returns no logits, they are NaN, or a label is none of its classes.
    """
    scores = score_all(model, dataloader, accelerator, disable_tqdm)
    del scores["predicted"]
    return results_of(scores)


class AccuracyEvaluation:
    """Measures classifiers on one dataset, each also against the dense one on the same images.

    Args:
        loader: batches of `pixel_values` and `labels` in a fixed order; not prepared.
        accelerator: from accelerate.
        disable_tqdm: no progress bars.

    Attributes:
        predicted: the class that the model measured last gave each example, `(n,)` int64; None before the first.
    """

    def __init__(self, loader: DataLoader, accelerator: Accelerator, disable_tqdm: bool = False) -> None:
        self.loader, self.accelerator, self.disable_tqdm = loader, accelerator, disable_tqdm
        self.dense: dict[str, torch.Tensor] | None = None
        self.predicted: torch.Tensor | None = None

    def measure_dense(self, model: nn.Module) -> dict[str, float]:
        """Measure the model that those measured afterwards are compared with; result and errors as of `measure`."""
        self.dense = self._score(model)
        return results_of(self.dense)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return what `evaluate_model` does, errors as there; where the dense model was measured also the standard
        errors of the differences to it, `_drop_se`.
        """
        scores = self._score(model)
        return results_of(scores) | ({} if self.dense is None else drop_errors(self.dense, scores))

    def _score(self, model: nn.Module) -> dict[str, torch.Tensor]:
        loader = self.accelerator.prepare_data_loader(self.loader)
        scores = score_all(model, loader, self.accelerator, self.disable_tqdm)
        self.predicted = scores.pop("predicted")
        return scores
