"""What is measured says who wins, at which size, and why something was not measured."""

from dataclasses import replace

import pytest
import torch
from support.families import CLASSIFIERS
from support.inference import make_vit, measurement
from support.models import build

from cap_hf import CAPError
from cap_hf.inference import backends as module
from cap_hf.inference.backends import BACKENDS
from cap_hf.inference.benchmark import benchmark, compare, losses, make_batches, winners
from cap_hf.inference.example import make_example


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
    # int8 does not hide what the exact one loses, and is compared with int8 of others too.
    int8 = [measurement("dense", 1.0), measurement("sparse", 2.0), measurement("sparse_int8", 0.5)]
    assert losses(int8) == ["batch 1, 2 threads: sparse loses to dense, which is 2.00 times as fast"]
    assert losses([*int8[:1], int8[2], measurement("openvino_int8", 0.25)]) == [
        "batch 1, 2 threads: sparse_int8 loses to openvino_int8, which is 2.00 times as fast"
    ]


def test_the_fastest_is_named_with_what_its_outputs_lose():
    found = [
        measurement("dense", 4.0),
        measurement("sparse", 2.0, speedup=2.0),
        replace(measurement("fast", 1.0, speedup=4.0), max_difference=0.031, same_top1=0.9375, images=16),
        measurement("dense", 4.0, batch_size=8),
        replace(measurement("fast", 1.0, batch_size=8, speedup=4.0), max_difference=0.5),
        measurement("dense", 1.0, threads=1),
        measurement("sparse", 2.0, threads=1, speedup=0.5),
        measurement("sparse", 2.0, threads=4, speedup=1.5),
    ]
    assert winners(found) == [
        "batch 1, 2 threads: fastest here: fast, 4.00 times dense; WARNING: its outputs differ from dense by up to "
        "3.1% of the largest (same top-1 on 15 of 16 images); fastest with the outputs of dense: sparse, 2.00 times "
        "dense",
        "batch 8, 2 threads: fastest here: fast, 4.00 times dense; WARNING: its outputs differ from dense by up to "
        "50.0% of the largest; fastest with the outputs of dense: dense",
        "batch 1, 1 threads: fastest here: dense",
        "batch 1, 4 threads: fastest here: sparse, 1.50 times dense",
    ]


def test_outputs_are_compared_on_each_image_once():
    images = {"pixel_values": torch.arange(5)}
    assert [each["pixel_values"].tolist() for each in make_batches(images, 2)] == [[0, 1], [2, 3], [4, 0]]
    assert [each["pixel_values"].tolist() for each in make_batches(images, 7)] == [[0, 1, 2, 3, 4, 0, 1]]
    dense = torch.tensor([[1.0, 2.0], [-4.0, 0.0]])
    assert compare(dense + torch.tensor([[2.0, 0.0], [0.0, 0.0]]), dense) == (0.5, 0.5)
    assert compare(torch.ones(2, 2), torch.zeros(2, 2)) == (1.0, 1.0)


def test_images_that_are_given_are_those_that_are_compared(monkeypatch):
    model = make_vit()
    seen = []

    class Wrong(module.Backend):
        def __init__(self, subject):
            super().__init__(subject)
            seen.append(subject.images)

        def start(self, threads):
            call = super().start(threads)
            return lambda inputs: call(inputs).roll(1, 1)

    monkeypatch.setitem(BACKENDS, "wrong", Wrong)
    images = {"pixel_values": torch.rand(3, 3, 32, 32)}
    found, _ = benchmark(model, ["wrong"], [2], [1], runs=3, images=images)
    assert seen == [images]
    assert [(each.same_top1, each.images, each.batch_size) for each in found] == [(1, 3, 2), (0, 3, 2)]
    with pytest.raises(CAPError, match="one image is too few"):
        benchmark(model, [], [1], [1], images=make_example(model, 1))


def test_without_a_head_there_is_no_top1():
    found, _ = benchmark(make_vit().vit, ["dense_bf16"], [1], [1], runs=3)
    assert [each.same_top1 for each in found] == [None, None]
    assert found[1].max_difference > 0


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
