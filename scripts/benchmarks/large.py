"""Prune ViT-L/16 or DINOv2-giant, with random weights and few gradients, within a memory budget.

    python scripts/benchmarks/large.py --model vit-large --fisher_block_size 32 --max_memory 10GB --json large.json

Shows the plan, and that what it promises holds: the peak of resident memory, passes, and seconds of every phase. Time
and memory do not depend on what the weights are.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from results import Results
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from cap_hf import CAPCompressor, CAPConfig, Resources
from cap_hf.report import Phases


def vit_large() -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=1000
    )
    return ViTForImageClassification(config)


def dinov2_giant() -> PreTrainedModel:
    config = Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        use_swiglu_ffn=True,
        patch_size=14,
        image_size=518,
        num_labels=1000,
    )
    return Dinov2ForImageClassification(config)


MODELS = {"vit-large": vit_large, "dinov2-giant": dinov2_giant}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit-large")
    parser.add_argument("--fisher_block_size", default="auto", help="a number, 'row' or 'auto'")
    parser.add_argument("--max_memory", default="16GB")
    parser.add_argument("--max_passes", type=int, help="for --fisher_block_size auto")
    parser.add_argument("--spill_dir", help="a folder on a disk with room")
    parser.add_argument("--num_grads", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--json", type=Path, help="gets the figures")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, phases = MODELS[args.model](), Phases()
    size = args.fisher_block_size
    config = CAPConfig(num_grads=args.num_grads, fisher_block_size=int(size) if size.isdigit() else size)
    resources = Resources(args.max_memory, args.max_passes, args.spill_dir)
    compressor = CAPCompressor(model, config, resources=resources)
    batch = {"pixel_values": torch.randn(args.num_grads, 3, 224, 224), "labels": torch.arange(args.num_grads)}
    start = time.perf_counter()
    with Results(args, total=2) as results:
        results.measuring("collecting")
        with phases("collect"):
            compressor.collect([batch])
        results.advance()
        results.set(phases=phases.records, **describe_plan(compressor))
        results.measuring("pruning")
        with phases("prune"):
            report = compressor.prune(args.sparsity)
        results.advance()
        results.set(
            model=args.model,
            num_weights=report.num_weights,
            sparsity=report.sparsity,
            num_grads=args.num_grads,
            max_memory=args.max_memory,
            peak_bytes=max(record["peak_memory_bytes"]["cpu"] for record in phases.records),
            seconds=time.perf_counter() - start,
            phases=phases.records,
        )
    print(json.dumps(results.content, indent=2))


def describe_plan(compressor: CAPCompressor) -> dict[str, object]:
    """Return how the collection went through memory."""
    plan = compressor.plan
    return {"block_size": plan.block_size, "passes": len(plan.passes), "spilled_bytes": plan.spilled}


if __name__ == "__main__":
    main()
