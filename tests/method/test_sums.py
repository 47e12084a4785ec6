"""Symmetric sums."""

import pytest
import torch

from cap_hf.method.sums import SymmetricSums, sums_per_block


@pytest.mark.parametrize("size", [4, 16, 33, 96, 200])
def test_symmetric_sums_are_whole_products(size):
    """Little more than half is stored, and what is read back is the whole product."""
    torch.manual_seed(0)
    factors = torch.randn(3, 7, size, dtype=torch.float64)
    sums = SymmetricSums.zeros(3, size, torch.float64, torch.device("cpu"))
    sums.add(slice(0, 2), factors[:2])
    sums.add(slice(1, 3), factors[1:])
    expected = factors.mT @ factors * torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(sums.full(), expected)
    torch.testing.assert_close(sums.full(torch.tensor([2, 0])), expected[[2, 0]])
    torch.testing.assert_close(sums.diagonals(), expected.diagonal(dim1=1, dim2=2))
    stored = sum(strip[0].numel() for strip in sums.strips)
    assert stored == sums_per_block(size)
    if size >= 96:
        assert stored < 0.6 * size**2
