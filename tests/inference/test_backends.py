"""Every backend computes the model."""

import pytest
import torch
from support.inference import make_vit

from cap_hf.inference.backends import BACKENDS
from cap_hf.inference.benchmark import benchmark


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
