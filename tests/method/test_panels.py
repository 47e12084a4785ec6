"""What a GPU runs: one kernel for all steps of a panel, where there is one that does what PyTorch does."""

import logging

import pytest
import torch

from cap_hf.method import panels


@pytest.fixture(autouse=True)
def asked_anew():
    panels.fastest.cache_clear()
    yield
    panels.fastest.cache_clear()


def on_the_cpu(monkeypatch):
    """Let what is checked on CUDA be checked here."""
    check = panels.check_fused
    monkeypatch.setattr(panels, "check_fused", lambda remove, _, dtype: check(remove, torch.device("cpu"), dtype))


def test_the_kernel_is_taken_on_cuda_alone(monkeypatch):
    on_the_cpu(monkeypatch)
    kernel = lambda panel: panels.remove_in_torch(panel)  # noqa: E731
    monkeypatch.setattr(panels, "load_fused", lambda: kernel)
    assert panels.fastest("cuda", torch.float32) is kernel
    assert panels.fastest("cpu", torch.float32) is panels.remove_in_torch
    monkeypatch.setenv("CAP_HF_DISABLE_EXTENSIONS", "1")
    panels.fastest.cache_clear()
    assert panels.fastest("cuda", torch.float32) is panels.remove_in_torch


def test_without_triton_pytorch_does_it_and_a_warning_says_so(monkeypatch, caplog):
    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(panels, "load_fused", missing)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert panels.fastest("cuda", torch.float32) is panels.remove_in_torch
    assert [record.getMessage() for record in caplog.records] == [
        "The Triton kernel of the elimination cannot be used, slower PyTorch code is: No module named 'triton'"
    ]


@pytest.mark.parametrize("fault", ["costs", "pivots", "nothing"])
def test_a_kernel_that_does_something_else_is_not_taken(monkeypatch, caplog, fault):
    def wrong(panel):
        panels.remove_in_torch(panel)
        if fault == "costs":
            panel.costs.mul_(1.1)
        elif fault == "pivots":
            panel.pivots.copy_(panel.pivots.flip(1))
        else:
            panel.costs.fill_(torch.nan)

    on_the_cpu(monkeypatch)
    monkeypatch.setattr(panels, "load_fused", lambda: wrong)
    with caplog.at_level(logging.WARNING):
        assert panels.fastest("cuda", torch.float32) is panels.remove_in_torch
    assert "cannot be used" in caplog.text
