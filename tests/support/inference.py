"""Sparse weights, pruned ViTs large enough for sparse layers, and measurements that were never taken."""

import threading

import torch
from transformers import ViTConfig, ViTForImageClassification, set_seed

from cap_hf import find_targets
from cap_hf.inference.benchmark import Measurement
from cap_hf.inference.linear import SparseWeightLinear


def prune(model, sparsity):
    """Zeros at random in every target."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for target in find_targets(model):
            target.weight[torch.rand(target.weight.shape, generator=generator) < sparsity] = 0
    return model


def make_vit(sparsity=0.9):
    set_seed(0)
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    return prune(ViTForImageClassification(config).eval(), sparsity)


def sparse_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseWeightLinear)]


def pixels(model, batch_size=3):
    side = model.config.image_size
    return torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def logits(model, x):
    return model(pixel_values=x).logits


def make_weight(rows, cols, sparsity, seed=0):
    """A dense weight `(rows, cols)` with zeros at random."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return weight.masked_fill(torch.rand(rows, cols, generator=generator) < sparsity, 0.0)


def measurement(backend, seconds, batch_size=1, threads=2, low=None, high=None, speedup=1.0):
    """What a benchmark would say of a backend that takes so long."""
    rate = batch_size / seconds
    low, high = low or seconds, high or seconds
    return Measurement(backend, batch_size, threads, seconds, low, high, rate, 1, 0.0, speedup, (32, 32))


def in_threads(call):
    """What a call returns in four threads of Python at once, while PyTorch has three of its own."""
    results, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 4
    return results


def has_instruction_set(kernel, *args):
    """Whether this processor has the instruction set that a kernel is asked for; other errors are the caller's."""
    try:
        kernel(*args)
    except RuntimeError as error:
        if "no instruction set" not in str(error):
            raise
        return False
    return True
