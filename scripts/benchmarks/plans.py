"""Print what pruning large models would take on GPUs, on paper: memory, passes, and seconds of every phase.

    python scripts/benchmarks/plans.py --gpu H100 --json plans.json

No model is made whole: what an example costs grows evenly with the number of layers, so it is measured with one layer
and with two, on the CPU, and the weights of all are made without numbers.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
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

from cap_hf import CAPConfig
from cap_hf.collection.clock import PaperClock
from cap_hf.collection.costs import Costs, measure
from cap_hf.collection.forecast import Alike, Measured
from cap_hf.collection.hardware import parse_hardware
from cap_hf.collection.planning import make_plan
from cap_hf.collection.resources import Afterwards, Resources
from cap_hf.errors import CAPError
from cap_hf.method.losses import LabelLoss
from cap_hf.targets import find_targets, weight_layers


def vit(width: int, inner: int, heads: int, patch: int = 16) -> Callable[[int], PreTrainedModel]:
    """Return what makes a ViT of so many layers, with 224 pixels and 1,000 classes."""

    def make(layers: int) -> PreTrainedModel:
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            patch_size=patch,
            num_labels=1000,
        )
        return ViTForImageClassification(config)

    return make


def dinov2_giant(layers: int) -> PreTrainedModel:
    """Return a DINOv2-giant of so many layers."""
    config = Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=24,
        use_swiglu_ffn=True,
        patch_size=14,
        image_size=224,
        num_labels=1000,
    )
    return Dinov2ForImageClassification(config)


# How each is made, and its layers; the last has the sizes of ViT-22B (arXiv 2302.05442, table 1).
MODELS = {
    "ViT-S/16": (vit(384, 1536, 6), 12),
    "ViT-B/16": (vit(768, 3072, 12), 12),
    "ViT-L/16": (vit(1024, 4096, 16), 24),
    "ViT-H/14": (vit(1280, 5120, 16, 14), 32),
    "DINOv2-giant": (dinov2_giant, 40),
    "ViT-22B/14": (vit(6144, 24576, 48, 14), 48),
}


def costs_of(
    make: Callable[[int], PreTrainedModel], layers: int, whole: PreTrainedModel, clock: PaperClock, config: CAPConfig
) -> tuple[Costs, float]:
    """Return the costs of a gradient sample of a model of so many layers, and the seconds of an example's forward pass.

    What is said of each layer is that of `whole`, which has no numbers; memory and operations are those of one layer,
    and the difference of two to one for each of the others.
    """
    found = []
    for number in (1, 2):
        model = make(number)
        batch = {"pixel_values": torch.zeros(2, 3, 224, 224), "labels": torch.zeros(2, dtype=torch.long)}
        examples = [(batch, 2, None)]
        found.append((measure(model, examples, find_targets(model, 192), LabelLoss()), clock.forward(model, batch)))
    (one, first), (two, second) = found
    names = ("bytes", "kept", "model")
    more = {name: getattr(one, name) + (layers - 1) * (getattr(two, name) - getattr(one, name)) for name in names}
    # Layers are alike: the last of two stands for all. `model` is that of two layers.
    alike = {name.split(".")[-1]: (name, module) for name, module in weight_layers(model).items()}
    same = {name: alike[name.split(".")[-1]] for name in weight_layers(whole)}
    names = [target.name for target in find_targets(whole)]
    costs = replace(
        two,
        samples=64,
        positions={name: two.positions[same[name][0]] for name in names},
        kept_of={name: two.kept_of[same[name][0]] for name in names},
        work={module: two.work[same[name][1]] for name, module in weight_layers(whole).items()},
        **more,
    )
    forward = first + (layers - 1) * (second - first)
    return clock.timed(costs, forward, config), forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100", help="as in --plan_for gpu=H100")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8], help="GPUs")
    parser.add_argument("--fisher_block_size", default="auto", help="a number, 'row' or 'auto'")
    parser.add_argument("--num_grads", type=int, default=CAPConfig().num_grads)
    parser.add_argument("--json", type=Path, help="gets the figures")
    args = parser.parse_args()
    hardware, _ = parse_hardware(f"gpu={args.gpu}")
    clock, size = PaperClock(hardware), args.fisher_block_size
    block_size = int(size) if size.isdigit() else size
    config = CAPConfig(num_grads=args.num_grads, fisher_block_size=block_size, fisher_loss="labels")
    resources, afterwards = Resources(spill_dir="none"), Afterwards(1, refits=True)
    with Results(args, total=len(args.models), keys=("model", "processes")) as results:
        for name in args.models:
            results.measuring(name)
            make, layers = MODELS[name]
            with torch.device("meta"):
                whole = make(layers)
            costs, forward = costs_of(make, layers, whole, clock, config)
            again = clock.timed(costs, forward, CAPConfig())
            trials, rows = clock.trials(config), clock.trials(CAPConfig())
            measured = Measured(config, afterwards, costs, again, forward, trials, rows)
            available = clock.available(resources, costs)
            for count in args.counts:
                row = {"model": name, "parameters": whole.num_parameters(), "processes": count}
                try:
                    processes = Alike(count, clock.device)
                    plan = make_plan(
                        lambda size, model=whole: find_targets(model, size),
                        config,
                        resources,
                        costs,
                        processes,
                        afterwards,
                        available,
                    )
                    found = measured.forecast(plan, find_targets(whole), processes, None)
                    facts = {"block_size": plan.block_size, "passes": plan.num_passes, "bytes": plan.needed}
                    results.add(row | facts | {"seconds": dict(found.seconds), "together": sum(found.seconds.values())})
                except CAPError as error:
                    results.add(row | {"problem": str(error)})
            results.advance()


if __name__ == "__main__":
    main()
