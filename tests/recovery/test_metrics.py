"""What the Trainer measures while it trains."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from cap_hf.errors import CAPError
from cap_hf.recovery.metrics import check_metric, compute_metrics, first_logits


def test_top1_and_top5_are_counted():
    logits = np.asarray([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]], dtype=np.float32)
    # The best, the second best and the worst of six.
    found = compute_metrics(EvalPrediction(predictions=logits, label_ids=np.asarray([5, 1, 5])))
    assert found == {"top1": 1 / 3, "top5": 2 / 3}


def test_with_four_classes_there_is_no_top5():
    found = compute_metrics(EvalPrediction(predictions=np.eye(4, dtype=np.float32), label_ids=np.arange(4)))
    assert found == {"top1": 1.0}


def test_logits_alone_are_kept():
    logits, states = torch.zeros(2, 3), torch.zeros(2, 5, 8)
    assert first_logits((logits, states), None) is logits
    assert first_logits(logits, None) is logits


def test_the_best_checkpoint_has_the_best_of_what_is_measured():
    for name in (None, "loss", "eval_loss", "top1", "eval_top5"):
        check_metric(name, 10)
    with pytest.raises(CAPError, match="--metric_for_best_model accuracy is not one of loss, top1, top5$"):
        check_metric("accuracy", 10)
    with pytest.raises(CAPError, match="top5 is not one of loss, top1$"):
        check_metric("top5", 4)
    with pytest.raises(CAPError, match="top1 is not one of loss$"):
        check_metric("top1", 0)
