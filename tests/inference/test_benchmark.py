"""Every backend computes the model, and what is measured says who wins."""

import pytest
import torch
from support.inference import make_vit, measurement

from cap_hf import CAPError
from cap_hf.inference import benchmark as module
from cap_hf.inference.benchmark import BACKENDS, benchmark, losses


def test_every_backend_computes_the_same_model():
    names = [name for name in BACKENDS if "compile" not in name]
    before = torch.get_num_threads()
    found, missing = benchmark(make_vit(), names, [1, 3], [1, 2], runs=3)
    assert torch.get_num_threads() == before
    assert set(missing) <= {"openvino"}
    measured = [name for name in names if name not in missing]
    assert [(each.threads, each.batch_size, each.backend) for each in found] == [
        (threads, size, name) for threads in (1, 2) for size in (1, 3) for name in measured
    ]
    for each in found:
        assert 0 < each.low_seconds <= each.seconds <= each.high_seconds
        assert each.images_per_second == pytest.approx(each.batch_size / each.seconds)
        assert each.max_difference < (0.1 if each.backend == "dense_bf16" else 1e-4), each.backend
    sizes = {each.backend: each.weight_bytes for each in found}
    assert sizes["dense_bf16"] < 0.6 * sizes["dense"]
    assert sizes["sparse"] < sizes["dense"]


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
        def __init__(self, model):
            raise CAPError("not installed")

    monkeypatch.setitem(BACKENDS, "broken", Broken)
    monkeypatch.setitem(BACKENDS, "missing", Missing)
    found, missing = benchmark(make_vit(), ["broken", "missing"], [1], [1], runs=3)
    assert [each.backend for each in found] == ["dense"]
    assert missing == {"missing": "not installed", "broken": "failed: no such device more"}
    with pytest.raises(CAPError, match="'fast' is none of dense"):
        benchmark(make_vit(), ["fast"], [1], [1])
