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


def attention_reference(q, k, v, scale):
    """y (images, queries, heads, cols) in float32 for q (images, heads, queries, cols) and k, v (images, heads, keys,
    cols), all finite; each step is rounded as in the kernels."""
    one = np.float32
    q, k, v = (x.detach().float().numpy() for x in (q, k, v))
    mean = np.zeros_like(k[:, :, 0])
    for key in range(k.shape[2]):
        mean = mean + k[:, :, key]
    q8, of_queries = quantize_tokens_plainly(torch.from_numpy(q))
    k8, of_keys = quantize_tokens_plainly(torch.from_numpy(k - (mean / one(k.shape[2]))[:, :, None]))
    v8, of_values = quantize_tokens_plainly(torch.from_numpy(np.ascontiguousarray(v.swapaxes(2, 3))))
    scores = (q8.astype(np.int64) @ k8.astype(np.int64).swapaxes(2, 3)).astype(one) * of_keys.swapaxes(2, 3)
    scores = (scores - scores.max(axis=3, keepdims=True)) * (of_queries * (one(scale) * one(1.44269504)))
    scores = np.maximum(scores, one(-30))
    whole = np.rint(scores)
    rest, power = scores - whole, one(9.58285e-3)
    for term in (5.590643e-2, 2.4024099e-1, 6.9312419e-1, 1.0):
        power = power * rest + one(term)
    weights = np.rint(np.ldexp(power, whole.astype(np.int32)) * one(65535)).astype(np.int64)
    high, low = ((part @ v8.astype(np.int64).swapaxes(2, 3)).astype(one) for part in (weights >> 8, weights & 255))
    y = (high * one(256) + low) * of_values.swapaxes(2, 3) * (one(1) / weights.sum(axis=3, keepdims=True).astype(one))
    return torch.from_numpy(y.swapaxes(1, 2))


def layer_norm_reference(x, weight, bias, epsilon):
    """LayerNorm of x (..., cols) in float32 steps: sums go in 16 lanes, which are then added in halves, of the
    differences from the first number."""

    def mean(values):
        padded = np.zeros((*values.shape[:-1], -(-values.shape[-1] // 16) * 16), np.float32)
        padded[..., : values.shape[-1]] = values
        lanes = np.zeros((*values.shape[:-1], 16), np.float32)
        for first in range(0, padded.shape[-1], 16):
            lanes = lanes + padded[..., first : first + 16]
        for half in (8, 4, 2, 1):
            lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        return lanes / np.float32(values.shape[-1])

    x = x.numpy()
    x = x - x[..., :1]
    centred = x - mean(x)
    inverse = np.float32(1) / np.sqrt(mean(centred * centred) + np.float32(epsilon))
    return torch.from_numpy(centred * inverse * weight.numpy() + bias.numpy())
