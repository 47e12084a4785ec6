"""Tensors to pack: any bits, N:M patterns, unstructured zeros."""

import math

import numpy as np
import torch

from cap_hf.checkpoints.compression import INTEGERS

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def bits(tensor):
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def random_bits(shape, dtype, seed):
    """Any bit pattern: NaN payloads, infinities and -0.0 among them."""
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    return torch.frombuffer(bytearray(raw) or bytearray(8), dtype=dtype)[: math.prod(shape)].clone().view(shape)


def prune_nm(shape, n, m, seed=0):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    channels_last = tensor.movedim(1, -1) if tensor.dim() == 4 else tensor
    groups = channels_last.reshape(-1, m).clone()
    groups.scatter_(1, groups.abs().argsort(dim=1)[:, : m - n], 0.0)
    groups = groups.view(channels_last.shape)
    return groups.movedim(-1, 1).contiguous() if tensor.dim() == 4 else groups


def unstructured():
    tensor = torch.randn(9, 13, generator=torch.Generator().manual_seed(0))
    tensor[tensor.abs() < 1] = 0
    return tensor
