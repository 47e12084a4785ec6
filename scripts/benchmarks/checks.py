"""Check what a device computes: prunes against the same on the CPU, sparse inference against dense."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import make_batches, make_vit
from transformers import PreTrainedModel

from cap_hf import CAPCompressor, CAPConfig, CAPError, find_targets, optimize_for_inference
from cap_hf.method.panels import check_fused, load_fused

# What is checked: architecture, and what differs from the default config.
CHECKS: dict[str, tuple[str, dict]] = {
    "cap": ("ViT", {}),
    "cap, blocks of 16": ("ViT", {"fisher_block_size": 16}),
    "cap, bfloat16": ("ViT", {"fisher_dtype": "bfloat16"}),
    "cap, 2:4": ("ViT", {"allocation": "2:4"}),
    "cap, 1x4": ("ViT", {"pattern": "1x4"}),
    "cap, convolutions": ("ResNet", {}),
    "obs": ("ViT", {"method": "obs"}),
    "sparsegpt": ("ViT", {"method": "sparsegpt"}),
    "wanda": ("ViT", {"method": "wanda"}),
    "magnitude": ("ViT", {"method": "magnitude"}),
}
# Gradients differ by rounding between devices, so that weights of almost equal loss may change places.
LEAST_AGREEMENT, LOSS_TOLERANCE = 0.98, 0.02
# Logits of bfloat16 products in another order, relative to the largest.
LOGITS_TOLERANCE = 0.05


@contextmanager
def accelerator_on(device: str) -> Iterator[Accelerator]:
    """Give an Accelerator on a device, the one that further `Accelerator()` are on too."""
    # accelerate takes a device once per process, and has no public way to take another.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(cpu=device == "cpu")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def make_checked(architecture: str) -> PreTrainedModel:
    """Return a small model with random weights, large enough for gradients that can be compared."""
    if architecture == "ViT":
        model = make_vit("vit-test", num_labels=10)
    else:
        sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16, "layer_type": "basic"}
        transformers.set_seed(0)
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=10)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pruned_on(device: str, architecture: str, changes: dict) -> tuple[dict[str, torch.Tensor], float | None]:
    """Return the weights of all targets of a small model after pruning on a device, and the loss that was estimated."""
    model = make_checked(architecture)
    config = CAPConfig(num_grads=64, **changes)
    with accelerator_on(device) as accelerator:
        compressor = CAPCompressor(model, config, accelerator, disable_tqdm=True)
        compressor.collect(make_batches(64, 16, 32, labels=10))
        report = compressor.prune(None if config.nm else 0.6)
    return {target.name: target.weight.detach().cpu() for target in find_targets(model)}, report.loss


def check_prune(name: str, device: str) -> dict:
    """Compare a prune on a device with the same on the CPU.

    Raises:
        CAPError: they differ by more than rounding explains.
    """
    (expected, expected_loss), (found, found_loss) = (pruned_on(each, *CHECKS[name]) for each in ("cpu", device))
    same = sum(int(((found[target] == 0) == (weight == 0)).sum()) for target, weight in expected.items())
    agreement = same / sum(weight.numel() for weight in expected.values())
    difference = torch.cat([(found[target] - weight).flatten() for target, weight in expected.items()]).norm()
    row = {
        "mask_agreement": agreement,
        "weight_difference": float(difference / torch.cat([weight.flatten() for weight in expected.values()]).norm()),
        "loss_ratio": None if expected_loss is None else found_loss / expected_loss,
    }
    if agreement < (1.0 if name == "magnitude" else LEAST_AGREEMENT):
        raise CAPError(f"masks on {device} agree with the CPU's in {agreement:.4f} of the weights only")
    if expected_loss is not None and not abs(row["loss_ratio"] - 1) <= LOSS_TOLERANCE:
        raise CAPError(f"the loss on {device} is {row['loss_ratio']:.4f} times the CPU's")
    return row


def check_steps(device: torch.device) -> dict:
    """Compare the kernel that does the steps of the elimination on CUDA with PyTorch, which does them elsewhere.

    Raises:
        ArithmeticError, ImportError: it differs, or there is no Triton.
    """
    if device.type == "cuda":
        check_fused(load_fused(), device, torch.float32)
    return {"fused": device.type == "cuda"}


def make_pair(vit: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model with 2:4 zeros, and a copy that is optimised for inference on the device.

    On the CPU, which has no 2:4, the copy has the sparse kernel or PyTorch's CSR product.
    """
    model = make_vit(vit)
    CAPCompressor(model, CAPConfig(method="magnitude", allocation="2:4"), disable_tqdm=True).prune()
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sparse = copy.deepcopy(model)
    return model, optimize_for_inference(sparse, "semi_structured" if device.type == "cuda" else "csr")


@torch.inference_mode()
def difference_of(dense: PreTrainedModel, sparse: PreTrainedModel, pixels: torch.Tensor) -> float:
    """Return the largest difference of two models' logits, relative to the largest logit.

    Raises:
        CAPError: it is more than rounding explains.
    """
    expected, found = dense(pixel_values=pixels).logits.float(), sparse(pixel_values=pixels).logits.float()
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= LOGITS_TOLERANCE:
        raise CAPError(f"sparse logits differ from the dense ones by {difference:.3g}")
    return difference


def make_pixels(model: PreTrainedModel, batch_size: int, device: torch.device) -> torch.Tensor:
    """Return random images in the size and dtype of a model."""
    (batch,) = make_batches(batch_size, batch_size, model.config.image_size)
    return batch["pixel_values"].to(device, model.dtype)


def check_inference(device: torch.device) -> dict:
    """Compare the logits of a model with sparse layers with the dense ones."""
    dense, sparse = make_pair("vit-test", device)
    return {"logits_difference": difference_of(dense, sparse, make_pixels(dense, 8, device))}
