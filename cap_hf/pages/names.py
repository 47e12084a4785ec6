"""Where in a model a layer lies, by its name: how deep, and of which kind."""

from collections.abc import Sequence
from typing import NamedTuple

# What the parts of transformer blocks are called in transformers and timm, by the end of the name; the first that fits.
KINDS = (
    ("attention.output.dense", "o"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
    ("query", "q"),
    ("key", "k"),
    ("value", "v"),
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("out_proj", "o"),
    ("o_proj", "o"),
    ("attn.proj", "o"),
    ("attn.qkv", "qkv"),
    ("mlp.up_proj", "fc1"),
    ("mlp.down_proj", "fc2"),
    ("fc1", "fc1"),
    ("fc2", "fc2"),
)
# The order of rows; kinds that are not here come after, as the model has them.
ORDER = ("q", "k", "v", "qkv", "o", "fc1", "fc2")


class Place(NamedTuple):
    """A place on the map of a model.

    Attributes:
        depth: from 0, the number of the block that the layer lies in.
        kind: which layer of its block it is.
    """

    depth: int
    kind: str


def places_of(names: Sequence[str]) -> list[Place]:
    """Return where each layer lies: blocks are told by the numbers in the names, in the order of the model.

    `vit.encoder.layer.3.attention.attention.query` is `q` of block 3. Where two layers of one block would have the
    same kind, their kinds are longer parts of their names.
    """
    blocks: dict[tuple[str, ...], int] = {}
    taken: dict[tuple[int, str], int] = {}
    found: list[Place] = []
    for name in names:
        parts = name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        last = numbers[-1] if numbers else -1
        # In another tower, or a decoder, blocks are counted anew.
        depth = blocks.setdefault(tuple(parts[: last + 1]), len(blocks))
        rest = ".".join(parts[last + 1 :]) or parts[-1]
        kind = next((short for end, short in KINDS if f".{rest}".endswith(f".{end}")), rest)
        if (depth, kind) in taken:
            kind = rest
        while (depth, kind) in taken:
            kind += "'"
        taken[depth, kind] = 1
        found.append(Place(depth, kind))
    return found


def kinds_in_order(kinds: Sequence[str]) -> list[str]:
    """Return kinds, each once, in the order of the rows of a map."""
    return sorted(dict.fromkeys(kinds), key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))
