"""Masks: taken from a model, applied to it, verified. True marks a weight that is kept."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cap_hf.errors import CAPError
from cap_hf.patterns import BLOCK_PATTERNS, NMPattern, Pattern
from cap_hf.targets import Target, summarize

Masks = dict[str, torch.Tensor]

# The N:M patterns worth naming: the ones that hardware or libraries know, densest zeros first.
KNOWN_PATTERNS = (NMPattern(1, 8), NMPattern(1, 4), NMPattern(2, 8), NMPattern(4, 8), NMPattern(2, 4), NMPattern(1, 2))

# The share of what is kept, and of the zeros, that rounding makes 0 at most; on real models it is 1 to 2 %.
ROUNDED_TO_ZERO = 0.1


def take_masks(targets: Sequence[Target]) -> Masks:
    """Return each target's mask, `weight.shape` bool: False where its weight is exactly 0."""
    return {target.name: target.weight.detach() != 0 for target in targets}


@torch.no_grad()
def apply_masks(targets: Sequence[Target], masks: Mapping[str, torch.Tensor]) -> None:
    """Set every weight outside its mask to exactly 0, in place (also where it is infinite or not a number)."""
    for target in targets:
        target.weight.masked_fill_(~masks[target.name], 0.0)


def verify_masks(targets: Sequence[Target], masks: Mapping[str, torch.Tensor]) -> None:
    """Raise a CAPError that names the targets with a weight that is not 0 outside its mask."""
    violated = [target.name for target in targets if (target.weight.detach()[~masks[target.name]] != 0).any()]
    if violated:
        raise CAPError(
            f"a pruned weight is no longer 0 in {summarize(violated, 3)}: something changed it after its mask"
        )


def count_zeros(targets: Sequence[Target], unit: int = 1) -> tuple[int, int]:
    """Return how many weights lie in units of so many that are 0 as a whole, and how many weights the targets have."""
    blocks = [target.to_blocks(target.weight.detach()) for target in targets]
    return sum(unit * int(zero_units(each, unit).sum()) for each in blocks), sum(each.numel() for each in blocks)


def zero_units(weights: torch.Tensor, unit: int) -> torch.Tensor:
    """Return which units of so many weights of blocks `(n, B)` are 0 as a whole, `(n, B / unit)` bool."""
    return (weights == 0).unflatten(1, (-1, unit)).all(dim=2)


def target_sparsity(targets: Sequence[Target]) -> float:
    """Return the share of the targets' weights that are 0."""
    zeros, total = count_zeros(targets)
    return zeros / total


def find_pattern(target: Target, mask: torch.Tensor, rounded: bool = False) -> Pattern | None:
    """Return what a mask satisfies along the input channels, or None.

    Of the known N:M patterns the one with the most zeros; else the largest blocks that are kept or 0 as a whole.

    Args:
        target: that the mask is of.
        mask: `weight.shape` bool.
        rounded: whether weights were rounded after pruning, which makes zeros: a few may lie in blocks that are kept.
    """
    rows = target.to_blocks(mask).reshape(target.weight.shape[0], -1)
    channels = target.weight.shape[1]
    for pattern in sorted(KNOWN_PATTERNS, key=lambda each: (-each.sparsity, each.m)):
        if channels % pattern.m == 0 and (rows.unflatten(1, (-1, pattern.m)).sum(dim=2) <= pattern.n).all():
            return pattern
    if mask.all():
        return None
    for block in sorted(BLOCK_PATTERNS.values(), key=lambda each: -each.m):
        if channels % block.m == 0:
            kept = rows.unflatten(1, (-1, block.m))
            in_kept = block.m * int(kept.any(dim=2).sum())
            # Zeros that were pruned one by one are a larger share, of the zeros or of the blocks that they lie in.
            few = ROUNDED_TO_ZERO * min(in_kept, kept.numel() - in_kept) if rounded else 0
            if in_kept - int(kept.sum()) <= few:
                return block
    return None


def count_zero_blocks(target: Target, mask: torch.Tensor) -> dict[str, int]:
    """Return how many 1x2, 1x4 and 1x8 blocks of consecutive input channels a mask makes 0 as a whole.

    Sizes that do not divide the input channels are left out. Single zeros make whole blocks too, here and there.
    """
    rows = target.to_blocks(mask).reshape(target.weight.shape[0], -1)
    sizes = [pattern.m for pattern in BLOCK_PATTERNS.values() if target.weight.shape[1] % pattern.m == 0]
    return {f"1x{size}": int(zero_units(rows, size).sum()) for size in sizes}


def describe_masks(targets: Sequence[Target]) -> list[dict]:
    """Return what reports and cards say of each target's mask: name, shape, numbers of weights, zeros and zero blocks.

    The digest, 128 bits of SHA-256 in hexadecimal digits, changes with the place of any zero.
    """
    layers = []
    for target in targets:
        mask = (target.weight.detach() != 0).cpu().numpy()
        layers.append(
            {
                "name": target.name,
                "shape": tuple(target.weight.shape),
                "num_weights": mask.size,
                "num_zeros": mask.size - int(np.count_nonzero(mask)),
                "zero_blocks": count_zero_blocks(target, torch.from_numpy(mask)),
                "mask_digest": hashlib.sha256(np.packbits(mask).data).hexdigest()[:32],
            }
        )
    return layers


def differing_layers(targets: Sequence[Target], report: Mapping, rounded: bool = False) -> list[str] | None:
    """Return the layers whose zeros are not those that a checkpoint's report says; None if it says nothing of layers.

    A report without digests, of cap_hf before it wrote them, tells how many zeros there are and not where.

    Args:
        targets: all of the model.
        report: as read from report.json.
        rounded: whether weights were rounded after the report, which makes zeros: a layer may then have more of them.
    """
    # A report of `cap-hf prune` has its pruning under that name; one of CAPCompressor.save_pretrained is all pruning.
    stated = (report.get("pruning") or report).get("layers")
    if not stated:
        return None
    found = {layer["name"]: layer for layer in describe_masks(targets)}
    if rounded:
        stated = [layer for layer in stated if not _has_more_zeros(found.get(layer["name"], {}), layer)]
    facts = ("num_zeros", "mask_digest")
    return [
        layer["name"]
        for layer in stated
        if any(fact in layer and found.get(layer["name"], {}).get(fact) != layer[fact] for fact in facts)
    ]


def _has_more_zeros(found: Mapping, stated: Mapping) -> bool:
    """Return whether a layer, as `describe_masks` found it, has more zeros than a report says of it."""
    return found.get("num_zeros", 0) > stated.get("num_zeros", found.get("num_zeros", 0))
