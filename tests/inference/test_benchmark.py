"""What is measured says who wins, at which size, and why something was not measured."""

import pytest
import torch
from support.families import CLASSIFIERS
from support.inference import make_vit, measurement
from support.models import build

from cap_hf import CAPError
from cap_hf.inference import backends as module
from cap_hf.inference.backends import BACKENDS
from cap_hf.inference.benchmark import benchmark, losses


def test_losses_of_sparse_are_told():
    found = [
        measurement("dense", 3.0),
        measurement("sparse", 2.0),
        measurement("dense_bf16", 1.0),
        measurement("dense", 3.0, batch_size=8),
        measurement("sparse", 2.0, batch_size=8),
    ]
    assert losses(found) == ["batch 1, 2 threads: sparse loses to dense_bf16, which is 2.00 times as fast"]
    assert losses(found[:1]) == []


def test_a_backend_that_fails_is_reported_and_the_others_go_on(monkeypatch):
    class Broken(module.Backend):
        def start(self, threads):
            raise RuntimeError("\nno such device\nmore")

    class Missing(module.Backend):
        def __init__(self, subject):
            raise CAPError("not installed")

    class Full(module.Backend):
        def __init__(self, subject):
            raise OSError("no space\nleft on device")

    class Wrong(module.Backend):
        def start(self, threads):
            return lambda inputs: torch.full((1, 10), torch.nan)

    for kind in (Broken, Missing, Full, Wrong):
        monkeypatch.setitem(BACKENDS, kind.__name__, kind)
    found, missing = benchmark(make_vit(), ["Broken", "Missing", "Full", "Wrong"], [1], [1], runs=3)
    assert [each.backend for each in found] == ["dense"]
    assert missing == {
        "Missing": "not installed",
        "Full": "failed: no space left on device",
        "Broken": "failed: no such device more",
        "Wrong": "failed: it gives numbers that are not finite",
    }
    with pytest.raises(CAPError, match="'fast' is none of dense"):
        benchmark(make_vit(), ["fast"], [1], [1])


def test_images_are_of_the_size_that_the_model_is_used_with():
    """SigLIP's classifier has what there is to know of its images in the config of its vision part."""
    found, missing = benchmark(CLASSIFIERS["SigLIP"].build(), ["dense_bf16"], [1, 2], [1], runs=3)
    assert {each.image_size for each in found} == {(8, 8)}
    assert not missing
    found, _ = benchmark(build("ConvNext"), [], [1], [1], runs=3, image_size=(64, 32))
    assert found[0].to_dict()["image_size"] == (64, 32)


def only(forward, pixels, size):
    """Call a model with batches of one size, as one of videos takes only some."""
    if len(pixels) != size:
        raise ValueError(f"{len(pixels)} images")
    return forward(pixels)


def test_what_the_dense_model_cannot_do_is_one_line(monkeypatch):
    model = build("ViT")
    with pytest.raises(CAPError, match=r"fails on pixel_values of \(2, 3, 9, 9\) \(its config tells of .*, 8, 8\)\)"):
        benchmark(model, [], [1], [1], image_size=9)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda pixel_values: only(forward, pixel_values, 2))
    found, missing = benchmark(model, [], [2, 1], [1], runs=3)
    assert {each.batch_size for each in found} == {2}
    assert missing == {"dense": "failed: 1 images"}
    with pytest.raises(CAPError, match="ViTForImageClassification cannot be measured in PyTorch: failed: 1 images"):
        benchmark(model, [], [1], [1])
    monkeypatch.undo()
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    with pytest.raises(CAPError, match="NaN or infinite"):
        benchmark(model, [], [1], [1])
