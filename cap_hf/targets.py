"""Which weights may be pruned, and how a weight is cut into blocks."""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from cap_hf.config import check_type
from cap_hf.errors import CAPError
from cap_hf.models import check_adapters
from cap_hf.patterns import BlockPattern, NMPattern, Pattern
from cap_hf.towers import tower_of

logger = logging.getLogger(__name__)

# What has weights that may be pruned.
Layer = nn.Linear | nn.Conv2d

# Parts of a base model that are not its encoder, whatever the architecture calls them: patch and position
# embeddings (Swin v2 computes its position bias with an MLP), stems (what convolutional networks have in the place of
# an embedding; timm's ResNet calls it `conv1`), poolers, and heads (some classifiers are their own base model, as are
# all of timm's and what has a backbone inside; Siglip pools with a `head`, timm's DeiT and LeViT have a `head_dist`
# too; timm's `conv_head` is the encoder's last convolution). A
# detector's decoder is a part of its base model too.
NOT_ENCODER = re.compile(
    r"(^|\.)([^.]*(embed|position|pooler|classifier)[^.]*|(conv_)?stem|attn_pool|decoder|(?!conv_)([^.]*_)?head(_dist)?)(\.|$)"
    r"|^(fc|conv1)(\.|$)"
)


@dataclass(frozen=True)
class Target:
    """A weight that may be pruned, seen as `(num_blocks, block_size)`.

    A row is what feeds one output: `in_features` entries of a Linear; `kh * kw * in_channels / groups` of a
    Conv2d, input channels last, so that neighbours in a block are neighbours for N:M hardware too.

    Attributes:
        name: of the module.
        module: a Linear or a Conv2d, whose `weight` it is.
        block_size: weights per block.
        index: its place among the targets of the model.
        twins: further modules that compute with the same weight.
        part: number and count: of the rows that a process owns, which share is meant; (0, 1) for all (see
            `cap_hf.collection.shares`).
    """

    name: str
    module: Layer
    block_size: int
    index: int = 0
    twins: tuple[nn.Module, ...] = ()
    part: tuple[int, int] = (0, 1)

    @property
    def whole(self) -> "Target":
        """Return the target with all of its rows."""
        return self if self.part == (0, 1) else replace(self, part=(0, 1))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Return all modules that compute with the weight."""
        return (self.module, *self.twins)

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight itself."""
        return self.module.weight

    @property
    def num_blocks(self) -> int:
        """Return how many blocks the weight has."""
        return self.weight.numel() // self.block_size

    @property
    def row_size(self) -> int:
        """Return how many weights feed one output."""
        return self.weight[0].numel()

    @property
    def is_conv(self) -> bool:
        """Return whether it is a Conv2d's."""
        return isinstance(self.module, nn.Conv2d)

    def to_blocks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `(..., *weight.shape)` as `(..., num_blocks, block_size)`; a view where the memory order allows it."""
        leading = tensor.shape[: tensor.dim() - self.weight.dim()]
        if self.is_conv:
            tensor = tensor.movedim(-3, -1)
        return tensor.reshape(*leading, self.num_blocks, self.block_size)

    def from_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return `(num_blocks, block_size)` as `weight.shape`: the inverse of `to_blocks` for one weight."""
        if not self.is_conv:
            return blocks.reshape(self.weight.shape)
        out_channels, in_channels, height, width = self.weight.shape
        return blocks.reshape(out_channels, height, width, in_channels).movedim(-1, 1).contiguous()


def weight_layers(model: nn.Module) -> dict[str, Layer]:
    """Return every Linear and Conv2d of a model by name, subclasses and layers outside the encoder included.

    Modules that share one Parameter are one layer, under the first of their names.
    """
    layers: dict[str, Layer] = {}
    seen: set[torch.Tensor] = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight not in seen:
            seen.add(module.weight)
            layers[name] = module
    return layers


def find_targets(
    model: nn.Module,
    block_size: int | str = "row",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    pattern: Pattern | None = None,
) -> list[Target]:
    """Return the targets of a transformers model: Linear and Conv2d weights inside its encoder.

    Args:
        model: a transformers model, with a head (which lies outside `base_model`) or without; of one that sees images
            and reads text, the vision tower's weights are what may be pruned.
        block_size: 'row' or a number, fitted to each target by `fit_block_size`.
        include: fnmatch patterns on module names; only matches are kept.
        exclude: fnmatch patterns on module names; matches are left out.
        pattern: N:M, which must divide every target's input channels; or blocks, which leave the targets out that
            they do not divide.

    Raises:
        CAPError: there is no target, the model takes no images, a pattern matches nothing, N:M does not divide a row,
            the block size is no size, or the model has adapters of PEFT, whose weights are no layers of their own.
    """
    check_type("model", model, nn.Module, "load one first")
    check_type("pattern", pattern, (NMPattern, BlockPattern), "pass such as NMPattern(2, 4)")
    for name, patterns in (("include", include), ("exclude", exclude)):
        check_type(name, patterns, Sequence, "pass a list of patterns, such as ['*.mlp.*']")
    check_adapters(model)
    layers = weight_layers(model)
    unfit = reasons_against(model, layers)
    candidates = {name: module for name, module in layers.items() if name not in unfit}
    if not candidates:
        # One layer of each kind says what is meant.
        why = {reason: f"{name}: {reason}" for name, reason in unfit.items()}
        raise CAPError(
            f"{type(model).__name__} has no Linear or Conv2d weight inside an encoder: nothing to prune"
            + (f" ({summarize(list(why.values()))})" if why else "")
        )
    for option, patterns in (("include", include), ("exclude", exclude)):
        for glob in patterns or ():
            if not any(fnmatchcase(name, glob) for name in candidates):
                raise CAPError(f"--{option} {glob!r} matches no target; the targets are {summarize(list(candidates))}")
    chosen = {
        name: module
        for name, module in candidates.items()
        if (not include or any(fnmatchcase(name, glob) for glob in include))
        and not any(fnmatchcase(name, glob) for glob in exclude or ())
    }
    if not chosen:
        raise CAPError(f"--include and --exclude leave no target of {summarize(list(candidates))}")
    if isinstance(pattern, BlockPattern):
        odd = [name for name, module in chosen.items() if module.weight.shape[1] % pattern.m]
        chosen = {name: module for name, module in chosen.items() if name not in odd}
        if not chosen:
            raise CAPError(f"{pattern} divides the input channels of no target: {summarize(odd)}")
        if odd:
            warn_of_odd(str(pattern), tuple(odd), id(model))
    sharing = twins_of(model, chosen)
    return [
        Target(name, module, fit_block_size(name, module, block_size, pattern), index, sharing[name])
        for index, (name, module) in enumerate(chosen.items())
    ]


@functools.cache
def warn_of_odd(pattern: str, names: tuple[str, ...], model: int) -> None:
    """Log, once per model, by its `id`, which targets blocks leave out."""
    logger.warning(
        "Left as they are, because %s does not divide their input channels: %s", pattern, summarize(names, 3)
    )


def left_alone(model: nn.Module, targets: Sequence[Target]) -> dict[str, str]:
    """Return, by name, why each Linear and Conv2d of a model that is no target is none."""
    layers = weight_layers(model)
    unfit, pruned = reasons_against(model, layers), {target.name for target in targets}
    return {name: unfit.get(name, "not chosen by include, exclude or pattern") for name in layers if name not in pruned}


def reasons_against(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Return, by name, why some layers of a model cannot be targets; the others can."""
    tower = tower_of(model)
    base = getattr(tower, "base_model", tower)
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is base), "")
    channels = getattr(getattr(tower, "config", None), "num_channels", None)
    sharing = twins_of(model, layers)
    reasons = {}
    for name, module in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        others = sorted({type(twin).__name__ for twin in sharing[name] if not computes_plainly(twin)})
        if not name.startswith(prefix):
            reasons[name] = f"outside the encoder, {prefix.removesuffix('.')}"
        elif NOT_ENCODER.search(name.removeprefix(prefix)):
            reasons[name] = "an embedding, a pooler, a decoder or a head"
        elif isinstance(module, nn.Conv2d) and module.in_channels == channels:
            reasons[name] = "it reads the pixels: an embedding"
        elif own_weight(module) is None:
            reasons[name] = "its weight is computed from other parameters"
        elif not computes_plainly(module):
            reasons[name] = f"{type(module).__name__} does not compute as its base class does"
        elif isinstance(parent, nn.MultiheadAttention):
            reasons[name] = "MultiheadAttention uses its weight without calling it"
        elif others:
            reasons[name] = f"it shares its weight with a module of another kind: {', '.join(others)}"
    return reasons


def computes_plainly(module: nn.Module) -> bool:
    """Return whether a module computes as nn.Linear or nn.Conv2d does: it is one, or a subclass with its forward.

    Other subclasses may compute with something else than their weight and input: standardised weights, or an input
    that they pad themselves.
    """
    base = next((base for base in (nn.Linear, nn.Conv2d) if isinstance(module, base)), None)
    names = ("forward", "_conv_forward") if base is nn.Conv2d else ("forward",)
    return base is not None and all(getattr(type(module), name) is getattr(base, name) for name in names)


def twins_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, ...]]:
    """Return for each of some layers of a model the other modules whose `weight` is its own."""
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        weight = own_weight(module)
        if weight is not None:
            users.setdefault(weight, []).append(module)
    # What makes its weight anew each time shares it with nobody.
    weights = {name: own_weight(layer) for name, layer in layers.items()}
    return {
        name: () if weight is None else tuple(each for each in users[weight] if each is not layers[name])
        for name, weight in weights.items()
    }


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Return the parameter that is a module's `weight`; None of those that compute it from something else."""
    return module._parameters.get("weight")


def fit_block_size(name: str, module: Layer, block_size: int | str, pattern: Pattern | None = None) -> int:
    """Return the block size nearest to the one asked for that is a divisor of a row, a row, or several rows.

    Args:
        name: the target's name, for the error.
        module: a Linear or a Conv2d.
        block_size: 'row', or a number: the largest fitting size that does not exceed it.
        pattern: N:M, or blocks of M; then the size is a multiple of M.

    Raises:
        CAPError: M does not divide the row's input channels, no size fits, or it is another word than 'row'.
    """
    rows, row = module.weight.shape[0], module.weight[0].numel()
    unit = 1
    if pattern is not None:
        channels = module.weight.shape[1]
        if channels % pattern.m:
            raise CAPError(
                f"{pattern} does not divide the {channels} input channels of {name}; "
                f"leave it out with --exclude '{name}' or choose an M that divides {channels}"
            )
        unit = pattern.m
    if block_size == "row":
        return row
    if not isinstance(block_size, int):
        raise CAPError(f"block_size={block_size!r} is neither 'row' nor a number")
    if block_size >= row:
        return row * max(count for count in range(1, min(rows, block_size // row) + 1) if rows % count == 0)
    sizes = [size for size in range(unit, block_size + 1, unit) if row % size == 0]
    if not sizes:
        raise CAPError(f"fisher_block_size={block_size} is smaller than the M of {pattern} that {name} needs")
    return max(sizes)


def summarize(names: Sequence[str], limit: int = 6) -> str:
    """Return `a, b, c ... (n in all)`: the choices there are, short enough for one line."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} ... ({len(names)} in all)"
