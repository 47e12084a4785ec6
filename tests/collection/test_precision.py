"""One switch of CUDA's matrix products, and what it was before."""

import subprocess
import sys
import types

import pytest
import torch

from cap_hf.collection import precision
from cap_hf.collection.precision import matmul_precision


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_the_switch_is_put_back(before):
    matmul = torch.backends.cuda.matmul
    found = matmul.fp32_precision
    matmul.fp32_precision = before
    try:
        check_switch(matmul, before)
    finally:
        matmul.fp32_precision = found


def check_switch(matmul, before):
    with matmul_precision(torch.float32):
        assert matmul.fp32_precision == "ieee"
        with matmul_precision(torch.bfloat16):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == before


def test_it_may_have_been_set_by_the_older_interface():
    """What `--tf32` and torch.compile leave behind raised where both interfaces met."""
    code = """
import torch
from cap_hf.collection.precision import matmul_precision

torch.set_float32_matmul_precision("high")
with matmul_precision(torch.float32):
    print(torch.backends.cuda.matmul.fp32_precision)
print(torch.get_float32_matmul_precision())
"""
    # A process of its own: what one interface has set the other does not put back.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ieee", "high"]


def test_an_older_pytorch_has_another_switch(monkeypatch):
    old = types.SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(precision.torch.backends.cuda, "matmul", old)
    with matmul_precision(torch.float32):
        assert old.allow_tf32 is False
    assert old.allow_tf32 is True
