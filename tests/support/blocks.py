"""Blocks that are eliminated in tests, and whether two eliminations are the same."""

import torch

from cap_hf.method import elimination


def make_blocks(seed, n, size, zeros=0.0, samples=None):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(n, samples or 2 * size, size, generator=generator, dtype=torch.float64)
    fisher = gradients.mT @ gradients / gradients.shape[1]
    fisher.diagonal(dim1=-2, dim2=-1).add_(1e-3)
    weights = torch.randn(n, size, generator=generator, dtype=torch.float64)
    weights[torch.rand(n, size, generator=generator) < zeros] = 0.0
    return weights, elimination.decouple(fisher, weights == 0)


def same_removals(found, expected):
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-8, atol=1e-12)
    costs = expected.losses > 0  # what is 0 already goes in any order
    assert torch.equal(found.order[costs], expected.order[costs])
    assert torch.equal(found.order.sort(dim=1).values, expected.order.sort(dim=1).values)
