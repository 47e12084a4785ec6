"""The metric against scikit-learn and plain torch."""

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import top_k_accuracy_score
from support.models import build, random_batches
from torch.nn import functional as F
from torch.utils.data import DataLoader

from cap_hf.data.arguments import DataArguments
from cap_hf.data.evaluation import AccuracyEvaluation, ImageClassificationMetric, evaluate_model
from cap_hf.data.images import ImageDataset, make_dataloader
from cap_hf.data.splits import load_splits
from cap_hf.errors import CAPError


def compute(logits, labels):
    return ImageClassificationMetric(keep_in_memory=True).compute(predictions=logits, references=labels)


def test_equals_scikit_learn_and_torch():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((200, 12)).astype(np.float32), rng.integers(0, 12, 200)
    found = compute(logits, labels)
    assert found["top1"] == (logits.argmax(axis=1) == labels).mean()
    assert found["top5"] == top_k_accuracy_score(labels, logits, k=5, labels=np.arange(12))
    expected = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert found["num_examples"] == 200


def test_broken_logits_are_never_right():
    logits = np.zeros((3, 10), dtype=np.float32)
    assert compute(logits, [0, 4, 9])["top1"] == 1 / 3
    assert compute(logits, [0, 4, 9])["top5"] == 2 / 3
    assert compute(np.full((3, 10), np.nan, dtype=np.float32), [0, 1, 2])["top1"] == 0


def test_few_classes_have_no_top5():
    assert "top5" not in compute(np.eye(4, dtype=np.float32), [0, 1, 2, 3])


def test_evaluate_model_equals_a_plain_loop(tiny_vit, tiny_checkpoint):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tiny_checkpoint)
    split = load_splits(DataArguments(max_eval_samples=70))["eval"]
    loader = make_dataloader(ImageDataset(split, processor, tiny_vit.config, DataArguments()), 32)
    tiny_vit.train()
    found = evaluate_model(tiny_vit, Accelerator().prepare(loader), Accelerator())
    assert tiny_vit.training
    tiny_vit.eval()
    with torch.no_grad():
        logits = torch.cat([tiny_vit(batch["pixel_values"]).logits for batch in loader])
    labels = torch.tensor(split["label"][:])
    assert found["top1"] == (logits.argmax(dim=1) == labels).double().mean().item()
    np.testing.assert_allclose(found["loss"], F.cross_entropy(logits, labels).item(), rtol=1e-5)
    assert found["num_examples"] == 70


@pytest.mark.parametrize("label", [-100, 10])
def test_a_label_that_is_no_class_is_refused(label):
    """-100 counted from the end of the logits, and was counted as an example."""
    model = build("ViT")
    batches = random_batches(model, 8)
    batches[0]["labels"][2] = label
    with pytest.raises(CAPError, match=rf"example 2 has label {label}, the model has classes 0 to 9"):
        evaluate_model(model, batches, Accelerator(), disable_tqdm=True)


def test_a_model_that_returns_tuples_is_measured_like_any():
    model, other = build("ViT"), build("ViT")
    plain = other.forward
    other.forward = lambda *args, **kwargs: plain(*args, **kwargs).to_tuple()
    expected = evaluate_model(model, random_batches(model, 8), Accelerator(), disable_tqdm=True)
    assert evaluate_model(other, random_batches(model, 8), Accelerator(), disable_tqdm=True) == expected


def test_what_is_counted_in_memory_needs_no_place_on_disk(tmp_path, monkeypatch):
    """`evaluate` makes a folder for it all the same: a home that cannot be written ended in a traceback."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "file" / "metrics"))
    metric = ImageClassificationMetric(keep_in_memory=True)
    metric.add_batch(predictions=[[0.0, 1.0]], references=[1])
    assert metric.compute()["top1"] == 1


def test_a_model_that_gives_no_numbers_is_not_measured():
    model = build("ViT")
    model.classifier.bias.data[3] = float("nan")
    with pytest.raises(CAPError, match="the model's logits are NaN: check its weights"):
        evaluate_model(model, random_batches(model, 8), Accelerator(), disable_tqdm=True)


def test_what_is_lost_is_compared_image_by_image():
    """Against numpy, on logits that plain calls return; a second model that is the first one has lost nothing."""
    dense, sparse = build("ViT"), build("ViT")
    sparse.load_state_dict(dense.state_dict())
    sparse.vit.layers[0].mlp.fc1.weight.data.mul_(-8)
    batches = random_batches(dense, 8, sizes=(8, 8, 4))
    loader = DataLoader(
        [{name: value[i] for name, value in b.items()} for b in batches for i in range(len(b["labels"]))], 8
    )
    evaluation = AccuracyEvaluation(loader, Accelerator(), disable_tqdm=True)
    assert evaluation.measure(sparse).keys() == {
        f"{name}{end}" for name in ("top1", "top5", "loss") for end in ("", "_se")
    } | {"num_examples"}
    first, second, again = evaluation.measure_dense(dense), evaluation.measure(sparse), evaluation.measure(dense)
    hits, losses = [], []
    with torch.no_grad():
        for model in (dense, sparse):
            logits = torch.cat([model(pixel_values=batch["pixel_values"]).logits for batch in batches])
            labels = torch.cat([batch["labels"] for batch in batches])
            hits.append((logits.argmax(dim=1) == labels).double().numpy())
            losses.append(F.cross_entropy(logits.double(), labels, reduction="none").numpy())
    for found, hit, loss in ((first, hits[0], losses[0]), (second, hits[1], losses[1])):
        share = hit.mean()
        assert found["top1_se"] == pytest.approx(np.sqrt(share * (1 - share) / 20))
        assert found["loss_se"] == pytest.approx(loss.std() / np.sqrt(20), rel=1e-5)
    assert second["top1_drop_se"] == pytest.approx((hits[0] - hits[1]).std() / np.sqrt(20))
    assert second["loss_drop_se"] == pytest.approx((losses[0] - losses[1]).std() / np.sqrt(20), rel=1e-5)
    assert second["top1_drop_se"] > 0
    assert again == first | {"top1_drop_se": 0, "top5_drop_se": 0, "loss_drop_se": 0}
