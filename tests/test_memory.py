"""Memory that is asked for."""

import pytest
import torch

from cap_hf.memory import HUGE_PAGE, zeros


@pytest.mark.parametrize("numel", [0, 1, HUGE_PAGE // 4, HUGE_PAGE // 2 + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64])
def test_zeros_are_zeros_of_their_own(numel, dtype):
    first, second = (zeros((1, numel), dtype, torch.device("cpu")) for _ in range(2))
    assert first.shape == (1, numel)
    assert first.dtype == dtype
    assert not first.any()
    first += 1
    assert first.all()
    assert not second.any()
    del first
    assert not zeros((numel,), dtype, torch.device("cpu")).any()
