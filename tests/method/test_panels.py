"""What a GPU runs: one kernel for all steps of a panel, where there is one that does what PyTorch does."""

import logging

import pytest
import torch

from cap_hf.method import panels

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew():
    panels.fastest.cache_clear()
    yield
    panels.fastest.cache_clear()


def on_the_cpu(monkeypatch):
    """Let what is checked on CUDA be checked here."""
    check = panels.check_fused
    monkeypatch.setattr(panels, "check_fused", lambda remove, _, dtype: check(remove, CPU, dtype))


def test_the_kernel_is_taken_on_cuda_alone(monkeypatch):
    on_the_cpu(monkeypatch)

    def kernel(panel):
        panels.remove_in_torch(panel)

    monkeypatch.setattr(panels, "load_fused", lambda: kernel)
    assert panels.fastest(CUDA, torch.float32) is kernel
    assert panels.fastest(CPU, torch.float32) is panels.remove_in_torch
    monkeypatch.setenv("CAP_HF_DISABLE_EXTENSIONS", "1")
    panels.fastest.cache_clear()
    assert panels.fastest(CUDA, torch.float32) is panels.remove_in_torch


def test_without_triton_pytorch_does_it_and_a_warning_says_so(monkeypatch, caplog):
    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(panels, "load_fused", missing)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert panels.fastest(CUDA, torch.float32) is panels.remove_in_torch
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
        assert panels.fastest(CUDA, torch.float32) is panels.remove_in_torch
    assert "cannot be used" in caplog.text


def test_weights_that_cost_the_same_may_change_places(monkeypatch):
    """Rounding decides which of them goes first."""

    def exchanged(panel):
        panels.remove_in_torch(panel)
        panel.pivots[0, [3, 4]] = panel.pivots[0, [4, 3]]

    panels.check_fused(exchanged, CPU, torch.float32)


def test_the_check_does_not_depend_on_the_default_device():
    try:
        torch.set_default_device("meta")
        panels.check_fused(panels.remove_in_torch, CPU, torch.float32)
    finally:
        torch.set_default_device(None)


def test_losses_that_overflow_are_lost_pivots():
    """Not the roots that they are squares of."""
    with pytest.raises(panels.LostPivotError):
        panels.eliminate_in_torch(torch.tensor([[1e20]]), torch.ones(1, 1, 1))


def test_weights_may_lie_in_any_order_in_memory():
    weights, matrices = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5).repeat(3, 1, 1)

    def remove(panel):
        assert all(each.is_contiguous() for each in vars(panel).values() if isinstance(each, torch.Tensor))
        panels.remove_in_torch(panel)

    turned = weights.mT.contiguous().mT
    assert not turned.is_contiguous()
    found, expected = (panels.eliminate_in_torch(each, matrices, None, remove) for each in (turned, weights))
    assert torch.equal(found.order, expected.order)
