"""What is checked on a GPU: a result that differs from the CPU's, or from the dense model's, is an error."""

import pytest
import torch
from support.gpu import needs_gpu
from support.scripts import load_script

from cap_hf import CAPError

checks = load_script("benchmarks/checks.py")


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in checks.CHECKS])
def test_a_prune_on_a_gpu_is_the_one_on_the_cpu(name):
    checks.check_prune(name, "cuda")


@pytest.mark.parametrize("mistake", ["mask", "loss"])
def test_a_device_that_prunes_otherwise_is_told(mistake, monkeypatch):
    right = {"layer": torch.tensor([1.0, 0.0] * 50)}
    wrong = {"layer": right["layer"].roll(1) if mistake == "mask" else right["layer"]}
    results = iter([(right, 1.0), (wrong, 1.5)])
    monkeypatch.setattr(checks, "pruned_on", lambda *args: next(results))
    match = "agree with the CPU's in 0.0000" if mistake == "mask" else r"loss on cuda is 1.5000 times"
    with pytest.raises(CAPError, match=match):
        checks.check_prune("cap", "cuda")


def test_sparse_logits_that_differ_are_told():
    dense, sparse = checks.make_pair("vit-test", torch.device("cpu"))
    with torch.no_grad():
        sparse.classifier.bias.add_(1.0)
    with pytest.raises(CAPError, match="sparse logits differ"):
        checks.difference_of(dense, sparse, checks.make_pixels(dense, 1, torch.device("cpu")))
