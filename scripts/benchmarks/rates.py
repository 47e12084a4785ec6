"""How fast a device sums Fishers and eliminates, as a share of the fastest matrix product that it is measured to do."""

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from models import make_batches, make_vit
from transformers import PreTrainedModel

from cap_hf import CAPCompressor, CAPConfig, Target, find_targets

SPARSITY = 0.75


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return how long some work takes, on the device too."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peak(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> dict[str, object]:
    """Return the floating point operations per second of matrix products of `size` x `size` in a dtype, the fastest.

    float32 is multiplied as PyTorch is set (`torch.get_float32_matmul_precision`).
    """
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    torch.mm(a, b)
    taken = min(seconds(device, lambda: [torch.mm(a, b) for _ in range(4)]) / 4 for _ in range(repeats))
    return {
        "flops_per_second": 2 * size**3 / taken,
        "measured_by": f"the fastest of {4 * repeats} matrix products of {size} x {size} in {dtype}",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def layer_of(vit: str, block_size: int) -> tuple[PreTrainedModel, list[Target]]:
    """Return a model of one encoder layer, and those of its targets whose rows have `block_size` weights."""
    model = make_vit(vit, num_hidden_layers=1)
    return model, [target for target in find_targets(model) if target.weight.shape[1] == block_size]


def measure_fisher(
    accelerator: Accelerator, vit: str, block_size: int, dtype: str, num_grads: int, repeats: int, peak: dict
) -> dict[str, object]:
    """Measure the Fisher of whole rows: collecting, less a bare forward and backward pass over the same examples.

    Args:
        vit: of `VITS`; one of its layers is taken.
        block_size: weights per row of the targets.
        dtype: of the gradients as they are multiplied.
        num_grads: gradient samples.
        repeats: after one that warms up.
        peak: of the same dtype, as `measure_peak` returns it.
    """
    device = accelerator.device
    model, targets = layer_of(vit, block_size)
    names = [target.name for target in targets]
    config = CAPConfig(num_grads=num_grads, fisher_dtype=dtype, fisher_block_size="row", include=names)
    compressor = CAPCompressor(model, config, accelerator, disable_tqdm=True)
    side, patch = model.config.image_size, model.config.patch_size
    batches = make_batches(num_grads, min(num_grads, 64), side)
    calls = {
        "collect": lambda: compressor.collect(batches),
        "forward_backward": lambda: forward_backward(model, batches, device),
    }
    times = [{name: seconds(device, call) for name, call in calls.items()} for _ in range(repeats + 1)][1:]
    weights, tokens = sum(target.weight.numel() for target in targets), (side // patch) ** 2 + 1
    # Per gradient: the product that it is, over all tokens, and the outer product of each of its blocks.
    operations = 2 * num_grads * weights * (tokens + block_size)
    taken = [each["collect"] - each["forward_backward"] for each in times]
    return {"block_size": block_size, "num_grads": num_grads} | rates(operations, taken, peak, times)


def measure_elimination(
    accelerator: Accelerator, vit: str, block_size: int, repeats: int, peak: dict
) -> dict[str, object]:
    """Measure inverses and elimination of whole rows: a first pruning, less a second one, which eliminates no more.

    Args:
        vit, block_size, repeats: as of `measure_fisher`.
        peak: of float32, in which almost all of it is done.
    """
    device = accelerator.device
    model, targets = layer_of(vit, block_size)
    config = CAPConfig(num_grads=64, fisher_block_size="row", include=[target.name for target in targets])
    compressor = CAPCompressor(model, config, accelerator, disable_tqdm=True)
    batches = make_batches(64, 64, model.config.image_size)
    times = []
    for _ in range(repeats + 1):
        compressor.collect(batches)
        times.append({name: seconds(device, lambda: compressor.prune(SPARSITY)) for name in ("prune", "again")})
    blocks = sum(target.weight.shape[0] for target in targets)
    # Per block: factorisation and inverse take B^3, and the downdates of a matrix that shrinks 2/3 B^3.
    operations = blocks * 5 / 3 * block_size**3
    taken = [each["prune"] - each["again"] for each in times[1:]]
    return {"block_size": block_size, "blocks": blocks} | rates(operations, taken, peak, times[1:])


def forward_backward(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], device: torch.device) -> None:
    """Do what a training step does, but for the step."""
    for batch in batches:
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        model(**on_device).loss.backward()
        model.zero_grad()


def rates(operations: float, taken: list[float], peak: dict, times: list[dict[str, float]]) -> dict[str, object]:
    """Return operations per second, also as a share of the peak, of each repeat that took longer than nothing."""
    per_second = [operations / each for each in taken if each > 0]
    return {
        "operations": operations,
        "flops_per_second": per_second,
        "share_of_peak": [each / peak["flops_per_second"] for each in per_second],
        "seconds": {name: [each[name] for each in times] for name in times[0]},
    }
