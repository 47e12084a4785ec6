"""Which weights may be pruned, and how a weight is cut into blocks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from cap_hf.config import NMPattern
from cap_hf.errors import CAPError
from cap_hf.towers import tower_of

# What has weights that may be pruned.
Layer = nn.Linear | nn.Conv2d

# Parts of a base model that are not its encoder, whatever the architecture calls them: patch and position
# embeddings (Swin v2 computes its position bias with an MLP), poolers, and heads (some classifiers are their own
# base model; Siglip pools with a `head`).
NOT_ENCODER = re.compile(r"(^|\.)([^.]*(embed|position|pooler|classifier)[^.]*|head)(\.|$)|^fc$")


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
    """

    name: str
    module: Layer
    block_size: int
    index: int = 0
    twins: tuple[nn.Module, ...] = ()

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
    pattern: NMPattern | None = None,
) -> list[Target]:
    """Return the targets of a transformers model: Linear and Conv2d weights inside its encoder.

    Args:
        model: a transformers model, with a head (which lies outside `base_model`) or without; of one that sees images
            and reads text, the vision tower's weights are what may be pruned.
        block_size: 'row' or a number, fitted to each target by `fit_block_size`.
        include: fnmatch patterns on module names; only matches are kept.
        exclude: fnmatch patterns on module names; matches are left out.
        pattern: an N:M pattern that every target's rows must be divisible into.

    Raises:
        CAPError: there is no target, the model takes no images, a pattern matches nothing, N:M does not divide a row,
            or the block size is no size.
    """
    layers = weight_layers(model)
    tower = tower_of(model)
    base = getattr(tower, "base_model", tower)
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is base), "")
    sharing = twins_of(model, layers)
    candidates = {
        name: module
        for name, module in layers.items()
        if name.startswith(prefix)
        and not NOT_ENCODER.search(name.removeprefix(prefix))
        # Subclasses may compute with something else than their weight (weight standardisation, attention's own
        # projection that nobody calls), and so may other kinds of modules that share it.
        and type(module) in (nn.Linear, nn.Conv2d)
        and all(type(twin) is type(module) for twin in sharing[name])
    }
    if not candidates:
        raise CAPError(f"{type(model).__name__} has no Linear or Conv2d weight inside an encoder: nothing to prune")
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
    return [
        Target(name, module, fit_block_size(name, module, block_size, pattern), index, sharing[name])
        for index, (name, module) in enumerate(chosen.items())
    ]


def twins_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, ...]]:
    """Return for each of some layers of a model the other modules whose `weight` is its own."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        # Not the attribute: some modules make their weight anew each time.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        users.setdefault(id(weight), []).append(module)
    return {
        name: tuple(each for each in users[id(layer.weight)] if each is not layer) for name, layer in layers.items()
    }


def fit_block_size(name: str, module: Layer, block_size: int | str, pattern: NMPattern | None = None) -> int:
    """Return the block size nearest to the one asked for that is a divisor of a row, a row, or several rows.

    Args:
        name: the target's name, for the error.
        module: a Linear or a Conv2d.
        block_size: 'row', or a number: the largest fitting size that does not exceed it.
        pattern: an N:M pattern; then the size is a multiple of M.

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
    if isinstance(block_size, str):
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
