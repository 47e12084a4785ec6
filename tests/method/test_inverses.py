"""Inverses made of matrix products, which GPUs take, against those that a library makes at once."""

import pytest
import torch
from support.quadratics import inverse_of

from cap_hf.method import inverses


def matrices_of(size, dtype, least=1e-2):
    generator = torch.Generator().manual_seed(size)
    roots = torch.randn(3, size, size // 2 + 1, generator=generator, dtype=torch.float64)
    return (roots @ roots.mT / size + least * torch.eye(size, dtype=torch.float64)).to(dtype)


# Less than a leaf, one, a little more, halves that are not alike, and several levels.
@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 100, 128, 129, 192, 200, 321])
def test_halves_give_the_inverse_and_that_of_the_factor(size):
    matrices = matrices_of(size, torch.float64)
    inverse, factor, info = inverses.invert_by_halves(matrices)
    assert info.tolist() == [0, 0, 0]
    torch.testing.assert_close(inverse, inverse_of(matrices), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(factor, inverse_of(torch.linalg.cholesky(matrices)), rtol=1e-9, atol=1e-9)
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("least", [1e-2, 1e-3, 1e-4])
def test_halves_lose_few_more_digits_than_a_library(least):
    matrices = matrices_of(320, torch.float32, least)
    exact = inverse_of(matrices.double())

    def error(inverse):
        return float((inverse - exact).abs().max() / exact.abs().max())

    expected = error(torch.cholesky_inverse(torch.linalg.cholesky(matrices)))
    assert error(inverses.invert_by_halves(matrices)[0]) < 16 * expected


@pytest.mark.parametrize("at", [3, 70, 150, 199])
def test_a_block_that_is_not_positive_definite_is_told_wherever_it_is_not(at):
    matrices = matrices_of(200, torch.float64)
    matrices[1, at, at] = -1.0
    inverse, _, info = inverses.invert_by_halves(matrices)
    assert (info != 0).tolist() == [False, True, False]
    good = [0, 2]
    torch.testing.assert_close(inverse[good], inverse_of(matrices[good]), rtol=1e-9, atol=1e-9)
