"""Accuracy with `evaluate`, from a metric that ships with the package: nothing is downloaded."""

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from cap_hf.errors import CAPError
from cap_hf.outputs import logits_of
from cap_hf.towers import see


class ImageClassificationMetric(evaluate.Metric):
    """Top-1 and top-5 accuracy and cross entropy from logits.

    `compute` takes predictions `(n, classes)` logits and references `(n,)` labels, and returns `top1` and `top5` in
    [0, 1], `loss` in nats and `num_examples`. With fewer than 5 classes `top5` is left out.
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
        logits, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        wrong = (labels < 0) | (labels >= logits.shape[1])
        if wrong.any():
            raise CAPError(
                f"example {int(wrong.argmax())} has label {labels[wrong][0]}, the model has classes 0 to "
                f"{logits.shape[1] - 1}: leave examples without a label out"
            )
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        # Equal logits rank in the order of their classes, as argmax has it; one that is not a number is never right.
        earlier = np.arange(logits.shape[1]) < labels[:, None]
        rank = (~(logits <= own) | ((logits == own) & earlier)).sum(axis=1)
        shifted = logits - logits.max(axis=1, keepdims=True)
        nll = np.log(np.exp(shifted).sum(axis=1)) - np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
        results = {"top1": float((rank == 0).mean()), "loss": float(nll.mean()), "num_examples": len(labels)}
        if logits.shape[1] >= 5:
            results["top5"] = float((rank < 5).mean())
        return results


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
    metric = ImageClassificationMetric(keep_in_memory=True)
    model.to(accelerator.device)
    training = model.training
    model.eval()
    disable = disable_tqdm or not accelerator.is_main_process
    with torch.inference_mode():
        for batch in transformers_logging.tqdm(dataloader, desc="Evaluating", delay=2, disable=disable):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            logits = logits_of(see(model, batch))
            if logits.isnan().any():
                raise CAPError(
                    "the model's logits are NaN: check its weights, its dtype (load it in float32) and the pixel values"
                )
            logits, labels = accelerator.gather_for_metrics((logits.float(), batch["labels"]))
            metric.add_batch(predictions=logits.cpu().numpy(), references=labels.cpu().numpy())
    model.train(training)
    return metric.compute()
