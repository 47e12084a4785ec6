"""Features are those of a plain loop, and what is said of them is what numpy says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.backbones import tiny_clip, tiny_dinov2
from support.models import build

from cap_hf.data.features import FeatureEvaluation, compare_descriptors, describe, extract_features
from cap_hf.data.images import make_dataloader
from cap_hf.data.probes import linear_probe, nearest_neighbours
from cap_hf.errors import CAPError
from cap_hf.outputs import features_of
from cap_hf.towers import see


def examples(count: int, seed: int = 0, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    """Images of noise around the mean of their class."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, 3, (count,), generator=generator)
    pixels = torch.randn(count, 3, 8, 8, generator=generator) + 2 * (classes.view(-1, 1, 1, 1) - 1)
    if not labels:
        return [{"pixel_values": image} for image in pixels]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, classes, strict=True)]


def pruned(model):
    """A copy whose smaller half of every attention and MLP weight is 0."""
    other = tiny_dinov2()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in other.encoder.parameters():
            weight[weight.abs() < weight.abs().median()] = 0
    return other


@pytest.mark.parametrize("make", [tiny_dinov2, tiny_clip])
def test_features_are_those_of_a_plain_loop(make):
    model = make().train()
    data = examples(10)
    visited = []
    found = extract_features(
        model, make_dataloader(data, 4), Accelerator(), True, lambda *batch: visited.append((batch[0], batch[2]))
    )
    assert model.training
    assert visited == [(0, range(0, 4)), (1, range(4, 8)), (2, range(8, 10))]
    model.eval()
    with torch.no_grad():
        outputs = see(model, {"pixel_values": torch.stack([each["pixel_values"] for each in data])})
    torch.testing.assert_close(found.descriptors, outputs.pooler_output)
    assert found.labels.tolist() == [int(each["labels"]) for each in data]
    assert extract_features(model, make_dataloader(examples(3, labels=False), 4), Accelerator()).labels is None


def test_an_image_is_what_is_pooled_else_the_class_token_else_the_mean_of_its_patches():
    tokens, pooled = torch.randn(2, 5, 4), torch.randn(2, 4)
    outputs = SimpleNamespace(last_hidden_state=tokens, pooler_output=pooled)
    assert torch.equal(describe(features_of(outputs, 1)), pooled)
    outputs.pooler_output = None
    assert torch.equal(describe(features_of(outputs, 1)), tokens[:, 0])
    assert torch.equal(describe(features_of(outputs, 0)), tokens.mean(dim=1))


def test_a_model_against_the_dense_one_and_with_labels():
    model = tiny_dinov2()
    sparse = pruned(model)
    data, bank = examples(40), examples(60, seed=1)
    evaluation = FeatureEvaluation(make_dataloader(data, 16), make_dataloader(bank, 16), Accelerator(), True)
    dense, found = evaluation.measure_dense(model), evaluation.measure(sparse)
    hits = {}
    for name, each in (("dense", model), ("sparse", sparse)):
        with torch.no_grad():
            queries, known = (
                each(torch.stack([one["pixel_values"] for one in split])).pooler_output for split in (data, bank)
            )
        labels, wanted = (torch.stack([one["labels"] for one in split]) for split in (bank, data))
        hits[name] = {
            "queries": queries.double().numpy(),
            "knn_top1": (nearest_neighbours(known, labels, queries) == wanted).double().numpy(),
            "linear_top1": (linear_probe(known, labels, queries) == wanted).double().numpy(),
        }
    for probe in ("knn_top1", "linear_top1"):
        for name, measured in (("dense", dense), ("sparse", found)):
            assert measured[probe] == hits[name][probe].mean()
            assert measured[f"{probe}_se"] == pytest.approx(hits[name][probe].std() / np.sqrt(40))
        paired = hits["dense"][probe] - hits["sparse"][probe]
        assert found[f"{probe}_drop_se"] == pytest.approx(paired.std() / np.sqrt(40))
    a, b = hits["dense"]["queries"], hits["sparse"]["queries"]
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found["cosine"] == pytest.approx(cosines.mean(), rel=1e-5)
    assert found["cosine_se"] == pytest.approx(cosines.std() / np.sqrt(40), rel=1e-3)
    assert found["cosine_p5"] == pytest.approx(np.percentile(cosines, 5), rel=1e-5)
    with torch.no_grad():
        t, s = (each(torch.stack([one["pixel_values"] for one in data])).last_hidden_state for each in (model, sparse))
    t, s = t[:, 1:].double(), s[:, 1:].double()
    expected = ((s - t) ** 2).sum() / ((t - t.mean(dim=(0, 1))) ** 2).sum()
    assert found["patch_error"] == pytest.approx(float(expected), rel=1e-4)
    assert (dense["cosine"], dense["cosine_p5"], dense["patch_error"]) == (1, 1, 0)
    assert (found["num_examples"], found["bank_examples"]) == (40, 60)
    assert 0 < found["patch_error"] < 1
    # The dense model itself, measured as if it were another one.
    again = evaluation.measure(model)
    assert again["cosine"] == pytest.approx(1)
    assert (again["patch_error"], again["knn_top1"], again["knn_top1_drop_se"]) == (0, dense["knn_top1"], 0)


def test_without_labels_features_are_compared_alone():
    loader = make_dataloader(examples(8, labels=False), 4)
    evaluation = FeatureEvaluation(loader, None, Accelerator(), True)
    assert evaluation.measure(tiny_dinov2()) == {"num_examples": 8}
    evaluation.measure_dense(tiny_dinov2())
    found = evaluation.measure(pruned(tiny_dinov2()))
    assert found.keys() == {"cosine", "cosine_se", "cosine_p5", "patch_error", "num_examples"}


def test_a_classifier_is_compared_by_its_logits():
    evaluation = FeatureEvaluation(make_dataloader(examples(8, labels=False), 4), None, Accelerator(), True)
    assert evaluation.measure_dense(build("ViT")) == {"cosine": 1, "cosine_p5": 1, "num_examples": 8}
    assert evaluation.measure(build("ViT"))["cosine"] == pytest.approx(1)


def test_what_cannot_be_measured_is_one_line():
    model = tiny_dinov2()
    loader = make_dataloader(examples(6), 4)
    with pytest.raises(CAPError, match="the bank has 6 labelled train images"):
        FeatureEvaluation(loader, loader, Accelerator())
    evaluation = FeatureEvaluation(loader, None, Accelerator(), True)
    evaluation.measure_dense(model)
    with pytest.raises(CAPError, match="not as many and as long as the dense model's: compare models of one arch"):
        evaluation.measure(tiny_dinov2(patch_size=2))
    with pytest.raises(CAPError, match="features have 4 channels and the dense model's 3"):
        compare_descriptors(torch.ones(2, 4), torch.ones(2, 3))
    with torch.no_grad():
        model.layernorm.weight[3] = float("nan")
    with pytest.raises(CAPError, match="the features of image 0 are NaN or infinite: check the model's weights"):
        evaluation.measure(model)
