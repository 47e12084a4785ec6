"""One switch of CUDA's matrix products, and what it was before."""

import types

import pytest
import torch

from cap_hf.collection import precision
from cap_hf.collection.precision import matmul_precision


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_the_switch_is_put_back(monkeypatch, before):
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(matmul, "fp32_precision", before)
    with matmul_precision(torch.float32):
        assert matmul.fp32_precision == "ieee"
        with matmul_precision(torch.bfloat16):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == before


def test_it_may_have_been_set_by_the_older_interface():
    """What `--tf32` and torch.compile leave behind raised where both interfaces met."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with matmul_precision(torch.float32):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_older_pytorch_has_another_switch(monkeypatch):
    old = types.SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(precision.torch.backends.cuda, "matmul", old)
    with matmul_precision(torch.float32):
        assert old.allow_tf32 is False
    assert old.allow_tf32 is True
