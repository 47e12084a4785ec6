"""Structured pruning first, CAP on what is left: narrower MLPs by Torch-Pruning, then zeros in all that remains.

    python scripts/recipes/structured_then_cap.py --model_name_or_path M --dataset_name D \
        --mlp_ratio 0.25 --sparsity 0.75 --output_dir O

The narrower model is an ordinary checkpoint with another `intermediate_size`: it needs no package to load, and
everything of `cap-hf` works on it. For large ratios finetune it (`cap-hf finetune`) between the two steps.
Needs `pip install torch-pruning`. Works on ViT, DeiT and other encoders whose config has one `intermediate_size`.
"""

import argparse
import itertools
from pathlib import Path

import torch
import torch_pruning
from torch import nn
from transformers import PreTrainedModel

from cap_hf import CAPError
from cap_hf.commands import prune as prune_command
from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import load_image_processor, load_model
from cap_hf.inference.example import make_example


def find_mlps(model: PreTrainedModel) -> list[tuple[nn.Linear, nn.Linear]]:
    """Return the two Linear layers of every MLP, in the model's order.

    Raises:
        CAPError: the config has no `intermediate_size`, or no layers fit it.
    """
    width = getattr(model.config, "intermediate_size", None)
    if width is None:
        raise CAPError(f"the config of {type(model).__name__} has no intermediate_size")
    linears = [module for module in model.base_model.modules() if type(module) is nn.Linear]
    pairs = [
        (first, second)
        for first, second in itertools.pairwise(linears)
        if first.out_features == second.in_features == width and first.in_features == second.out_features
    ]
    if not pairs:
        raise CAPError(f"{type(model).__name__} has no MLP of two Linear layers")
    return pairs


def narrow_mlps(model: PreTrainedModel, ratio: float) -> PreTrainedModel:
    """Remove from every MLP the hidden units that matter least, in place; equally many, so that one config fits all.

    A unit's importance is the product of the norms of the weights into it and out of it.

    Args:
        ratio: share of the units that go, in (0, 1).
    """
    pairs = find_mlps(model)
    width = model.config.intermediate_size
    kept = max(1, round(width * (1 - ratio)))
    attention = model.config._attn_implementation
    # The graph of dependencies is traced through single operators.
    model.set_attn_implementation("eager")
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=make_example(model), output_transform=lambda output: output.logits
    )
    for first, second in pairs:
        importance = first.weight.detach().norm(dim=1) * second.weight.detach().norm(dim=0)
        least = importance.argsort()[: width - kept].tolist()
        graph.get_pruning_group(first, torch_pruning.prune_linear_out_channels, idxs=least).prune()
    model.set_attn_implementation(attention)
    model.config.intermediate_size = kept
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--mlp_ratio", type=float, default=0.25, help="share of the MLPs' units that go")
    parser.add_argument("--output_dir", type=Path, required=True)
    args, rest = parser.parse_known_args()  # the rest goes to `cap-hf prune`
    model_args = ModelArguments(args.model_name_or_path)
    model = narrow_mlps(load_model(model_args).eval(), args.mlp_ratio)
    narrow = args.output_dir / "narrow"
    model.save_pretrained(narrow)
    load_image_processor(model_args).save_pretrained(narrow)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{narrow}: MLPs of {model.config.intermediate_size} units, {parameters:,} parameters")
    torch.manual_seed(0)
    prune_command.main(["--model_name_or_path", str(narrow), "--output_dir", str(args.output_dir / "pruned"), *rest])


if __name__ == "__main__":
    main()
