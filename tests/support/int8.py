"""What the int8 kernels must give to the bit, in plain PyTorch: written from the definition, not from the kernels."""

import numpy as np
import torch

INT8_INSTRUCTION_SETS = ["portable", "avx2", "avx_vnni", "avx512_vnni"]


def quantize_tokens_plainly(x):
    """q, int32 of the shape of x, and scales (..., 1), in float32 steps that NumPy rounds as IEEE 754 says."""
    x = x.detach().float().numpy()
    largest = np.abs(x).max(axis=-1, keepdims=True)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    used = finite & (largest >= np.float32(2.0**-120))
    inverse = np.where(used, np.float32(127) / np.where(used, largest, np.float32(1)), np.float32(0))
    q = np.rint(np.where(finite, x, np.float32(0)) * inverse).astype(np.int32)
    scales = np.where(finite, np.where(used, largest / np.float32(127), np.float32(0)), np.float32("nan"))
    return q, scales


def int8_reference(x, weight, scales, bias):
    """y (..., rows) in float32 for an int8 weight (rows, cols); sums are exact."""
    q, of_tokens = quantize_tokens_plainly(x)
    sums = (q.astype(np.int64) @ weight.numpy().astype(np.int64).T).astype(np.int32)
    y = sums.astype(np.float32) * scales.numpy() * of_tokens
    return torch.from_numpy(y if bias is None else y + bias.float().numpy())


def make_block_weight(rows, cols, share, seed=0):
    """A dense weight (rows, cols), a share of whose groups of four consecutive inputs is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    zero = torch.rand(rows, -(-cols // 4), generator=generator) < share
    return weight.masked_fill(zero.repeat_interleave(4, dim=1)[:, :cols], 0.0)
