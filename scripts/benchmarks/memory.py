"""Measure whether a prune keeps to `--max_memory`, on models of different shapes with random weights.

    python scripts/benchmarks/memory.py --max_memory 4GB --json memory.json

Each model is collected, pruned and refitted with fewer gradients than a real run has: their number does not change the
memory. `over` is the peak of resident memory by what was allowed.
"""

import argparse
import gc
from pathlib import Path

import torch
from results import Results
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from cap_hf import CAPCompressor, CAPConfig, Resources
from cap_hf.errors import CAPError
from cap_hf.report import peak_memory, reset_peak_memory


def vit_small() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536))


def swin_tiny() -> PreTrainedModel:
    return SwinForImageClassification(SwinConfig())


def convnext_tiny() -> PreTrainedModel:
    return ConvNextForImageClassification(ConvNextConfig())


def resnet_50() -> PreTrainedModel:
    return ResNetForImageClassification(ResNetConfig())


MODELS = {"vit-small": vit_small, "swin-tiny": swin_tiny, "convnext-tiny": convnext_tiny, "resnet-50": resnet_50}
SIDE = 224


def prune(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Return how much memory a model took, or why it did not fit."""
    torch.manual_seed(0)
    model, size = MODELS[name](), args.fisher_block_size
    config = CAPConfig(
        num_grads=args.num_grads, fisher_block_size=int(size) if size.isdigit() else size, refit_examples=args.num_grads
    )
    batches = [
        {
            "pixel_values": torch.randn(args.batch_size, 3, SIDE, SIDE),
            "labels": torch.randint(model.config.num_labels, (args.batch_size,)),
        }
        for _ in range(-(-args.num_grads // args.batch_size))
    ]
    resources = Resources(args.max_memory, spill_dir=args.spill_dir)
    compressor = CAPCompressor(model, config, resources=resources, refits=True)
    gc.collect()
    reset_peak_memory()
    try:
        compressor.collect(batches).prune(0.75)
        compressor.refit(batches)
    except CAPError as error:
        return {"model": name, "problem": str(error)}
    plan, limit, peak = compressor.plan, resources.bytes, peak_memory()["cpu"]
    assert plan is not None
    assert limit is not None
    facts = {"block_size": plan.block_size, "passes": plan.num_passes, "spilled_bytes": plan.spilled}
    return {"model": name} | facts | {"peak_bytes": peak, "over": peak / limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--max_memory", default="4GB")
    parser.add_argument("--fisher_block_size", default="192", help="a number, 'row' or 'auto'")
    parser.add_argument("--spill_dir", help="a folder, or none")
    parser.add_argument("--num_grads", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="gets the figures")
    args = parser.parse_args()
    with Results(args, len(args.models), keys=("model",)) as results:
        for name in args.models:
            results.measuring(name)
            results.add(prune(name, args))
            results.advance()


if __name__ == "__main__":
    main()
