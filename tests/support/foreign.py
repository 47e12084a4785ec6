"""Checkpoints as other libraries write them, by loops over single entries and from the formats' definitions alone."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.prune import custom_from_mask
from transformers import PreTrainedModel

from cap_hf import find_targets
from support.checkpoints import make_processor

SPARSITY = {"format": "sparse-bitmask", "global_sparsity": 0.5, "sparsity_structure": "unstructured"}


def bitmask_parts(weight: torch.Tensor, kept: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The parts that compressed-tensors stores of a weight; with `kept`, of which half is 1, those of its 2:4 form."""
    mask = weight != 0 if kept is None else kept
    rows, columns = mask.reshape(-1, mask.shape[-1]), mask.shape[-1]
    packed = torch.zeros(len(rows), (columns + 7) // 8, dtype=torch.uint8)
    for row, bits in enumerate(rows.tolist()):
        for column, bit in enumerate(bits):
            packed[row, column // 8] += int(bit) << column % 8
    values = torch.stack([value for value, keep in zip(weight.flatten(), mask.flatten().tolist(), strict=True) if keep])
    parts = {
        "compressed": values,
        "bitmask": packed.reshape(*weight.shape[:-1], -1),
        "shape": torch.tensor(weight.shape),
    }
    if kept is not None:
        parts["compressed"] = values.reshape(len(weight), -1)
        return parts | {"shape": parts["shape"].reshape(-1, 1)}
    # Exclusive sums along the first dimension, whatever there are of others.
    counts, sums = mask.sum(dim=-1), torch.zeros(mask.shape[1:-1], dtype=torch.int64)
    if mask.dim() == 1:
        return parts | {"row_offsets": torch.tensor(0)}
    offsets = []
    for each in counts:
        offsets.append(sums)
        sums = sums + each
    return parts | {"row_offsets": torch.stack(offsets)}


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of each four entries, as a mask."""
    groups = weight.detach().abs().reshape(-1, 4)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.topk(2).indices, True).view(weight.shape)


def rewrite(folder: Path, change, sections: dict | None = None) -> None:
    """Change the tensors of a checkpoint in one file, and add sections to its config.json."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (sections or {})))


def save_bitmask(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as compressed-tensors does with the format sparse-bitmask, every `weight` in parts."""
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight")]:
            parts = bitmask_parts(tensors.pop(name))
            tensors.update({f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()})

    section = {"quant_method": "compressed-tensors", "version": "0.11.0", "sparsity_config": SPARSITY}
    rewrite(folder, pack, {"quantization_config": section | {"transform_config": {}}})


def save_masked(model: PreTrainedModel, folder: Path) -> None:
    """Save a model as torch.nn.utils.prune leaves it: each weight of its targets with a mask of its zeros."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for target in find_targets(pruned):
            mask = target.weight != 0
            # What is masked is seldom 0.
            target.weight[~mask] = -1.0
            custom_from_mask(pruned.get_submodule(target.name), "weight", mask.to(target.weight.dtype))
    pruned.save_pretrained(folder)
    make_processor().save_pretrained(folder)
