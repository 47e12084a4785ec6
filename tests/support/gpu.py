"""Tests that need an NVIDIA GPU: `pytest -m gpu` runs them, and without a GPU they are skipped with a reason."""

import pytest
import torch

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs an NVIDIA GPU of compute capability 8.0 or newer",
    ),
]
