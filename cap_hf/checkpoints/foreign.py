"""How other libraries store sparse weights: which tensors of a file make up one weight, and what they stand for.

compressed-tensors (up to 0.14) stores a module's weight in parts, in the place of `NAME.weight`:

    NAME.shape        of the weight, as integers: (n,), or (n, 1) in the 2:4 form
    NAME.compressed   the values that are kept, row by row: (values,); in the 2:4 form (rows, columns / 2)
    NAME.bitmask      uint8, a bit per entry, the lowest first: the weight's shape, the last dimension in bytes
    NAME.row_offsets  where each row's values begin; not in the 2:4 form, where each four entries have two

torch.nn.utils.prune stores a parameter as `NAME_orig` with `NAME_mask`, of one shape; the mask is 0 or 1. NNCF 3 leaves
the weight `a.b.weight` dense, with its mask beside it: `__nncf_hooks.post_hooks.a:b:weight__0.0.binary_mask`.

Nothing of a file is believed: shapes are compared before anything is read, and counts before anything is placed.
"""

import math
import re
from collections.abc import Collection, Mapping

import numpy as np
import torch

from cap_hf.errors import CAPError

SHAPE, VALUES, BITMASK, OFFSETS = "shape", "compressed", "bitmask", "row_offsets"
ORIGINAL, MASK = "_orig", "_mask"
# A weight has no more dimensions than that of a 3-D convolution.
MOST_DIMENSIONS = 5
# As safetensors calls them.
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")
HOOKS = "__nncf_hooks."
BINARY_MASK = re.compile(r"__nncf_hooks\.post_hooks\.(.+)__0\.0\.binary_mask")
# Of quantised weights, beside or in the place of the weight.
QUANTISED = ("weight_scale", "weight_packed", "weight_zero_point", "weight_global_scale")

# The shape and dtype that the header of a file says of a tensor.
Header = tuple[tuple[int, ...], str]


def find_parts(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the weights that are stored in parts: by the weight's name, the stored name of each of its parts.

    Args:
        names: of all tensors of a checkpoint.

    Raises:
        CAPError: a part is missing, a weight is there whole as well, or a part is none that is known.
    """
    names = set(names)
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        module, _, last = name.rpartition(".")
        if ".parametrizations." in name:
            raise CAPError(
                f"{name} is a parametrization, whose mask is not stored: remove it and save again, with "
                "torch.nn.utils.parametrize.remove_parametrizations or the squash_mask of a sparsifier of torch.ao"
            )
        if name.startswith(HOOKS):
            match = BINARY_MASK.fullmatch(name)
            weight = match[1].replace(":", ".") if match else name
            if weight not in names or not match:
                raise CAPError(f"{name} is of NNCF, and no mask of a weight that is there: save the model without it")
            found[weight] = {ORIGINAL: weight, MASK: name}
        if last in (VALUES, BITMASK, OFFSETS):
            parts = {part: f"{module}.{part}" for part in (SHAPE, VALUES, BITMASK, OFFSETS)}
            found.setdefault(f"{module}.weight", {}).update(_present(parts, names))
        for suffix in (ORIGINAL, MASK):
            base = name.removesuffix(suffix)
            both = base + ORIGINAL in names and base + MASK in names
            if base != name and (both or base.rpartition(".")[2] in ("weight", "bias")):
                parts = {part: base + part for part in (ORIGINAL, MASK)}
                found.setdefault(base, {}).update(_present(parts, names))
    for name, parts in found.items():
        masked = ORIGINAL in parts or MASK in parts
        if (name in names and name not in parts.values()) or (masked and VALUES in parts):
            raise CAPError(f"{name} is stored twice, once as {min(parts.values())}: remove the one or the other")
        for part in (ORIGINAL, MASK) if masked else (SHAPE, VALUES, BITMASK):
            if part not in parts:
                missing = name + part if masked else f"{name.removesuffix('weight')}{part}"
                raise CAPError(f"{missing} is missing, and {min(parts.values())} is there: save the checkpoint again")
    return found


def _present(parts: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return the parts whose stored name is among the names."""
    return {part: name for part, name in parts.items() if name in names}


def check_headers(name: str, headers: Mapping[str, Header]) -> None:
    """Raise a CAPError if the parts of a weight cannot be read, as far as their shapes and dtypes tell.

    Args:
        name: of the weight.
        headers: of each part.
    """
    for part, (shape, _) in headers.items():
        if math.prod(shape) == 0 and part not in (VALUES, OFFSETS):
            raise damaged(name, f"its {part.strip('_')} is empty")
    values = ORIGINAL if ORIGINAL in headers else VALUES
    dtype = headers[values][1]
    if dtype not in FLOATS:
        raise CAPError(
            f"{name} is stored in {dtype}, so it is quantised, which this command does not undo: convert the "
            "checkpoint in floats that it was made from"
        )
    if values == ORIGINAL:
        if headers[MASK][0] != headers[ORIGINAL][0]:
            raise damaged(name, f"its mask has the shape {headers[MASK][0]}, and the weight {headers[ORIGINAL][0]}")
        return
    shape, dtype = headers[SHAPE]
    if dtype not in INTEGERS or shape not in {(size,) for size in range(1, MOST_DIMENSIONS + 1)} | {(2, 1)}:
        raise damaged(name, f"its shape is a tensor of {dtype} in the shape {shape}")
    if headers[BITMASK][1] != "U8":
        raise damaged(name, f"its bitmask is made of {headers[BITMASK][1]}, not of U8")
    dimensions = len(headers[VALUES][0])
    if dimensions not in (1, 2):
        raise damaged(name, f"its values have {dimensions} dimensions, not 1 or, for 2:4, 2")
    if (OFFSETS in headers) != (dimensions == 1):
        has = "lacks row_offsets" if dimensions == 1 else "has row_offsets, which 2:4 has none of"
        raise damaged(name, f"it {has}")
    if OFFSETS in headers and headers[OFFSETS][1] not in INTEGERS:
        raise damaged(name, f"its row_offsets are made of {headers[OFFSETS][1]}")


def dense_bytes(headers: Mapping[str, Header]) -> int:
    """Return the most bytes that a tensor takes once it is whole, for memory to be asked for.

    Args:
        headers: of its parts, or the one of a tensor that is stored whole, under any name.
    """
    values = VALUES if VALUES in headers else ORIGINAL if ORIGINAL in headers else next(iter(headers))
    shape, dtype = headers[values]
    entries = 8 * math.prod(headers[BITMASK][0]) if BITMASK in headers else math.prod(shape)
    bits = re.search(r"\d+", dtype)  # none in BOOL
    return entries * (int(bits[0]) if bits else 8) // 8


def join(name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight that parts stand for, dense, in the dtype of its values; what is masked is +0.0.

    Args:
        name: of the weight.
        parts: that `check_headers` has passed.

    Raises:
        CAPError: they contradict each other.
    """
    return _join_masked(name, parts) if ORIGINAL in parts else _join_packed(name, parts)


def damaged(name: str, what: str) -> CAPError:
    """Return the error of a weight whose parts do not fit together."""
    return CAPError(f"{name} cannot be put together: {what}; the file is damaged, or of another format")


def _join_masked(name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    mask, weight = parts[MASK], parts[ORIGINAL]
    kept = mask != 0
    if not bool((mask[kept] == 1).all()):
        raise damaged(name, "its mask has other values than 0 and 1")
    # Not the product, which would make -0.0 of negative weights, and NaN of infinite ones.
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype))


def _join_packed(name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    shape = tuple(int(size) for size in parts[SHAPE].flatten())
    bitmask, values = parts[BITMASK].numpy(), parts[VALUES]
    if min(shape) < 1 or bitmask.shape != (*shape[:-1], -(-shape[-1] // 8)):
        raise damaged(name, f"its shape is {shape}, and its bitmask has the shape {bitmask.shape}")
    bits = np.unpackbits(bitmask, axis=-1, count=shape[-1], bitorder="little")
    if not np.array_equal(np.packbits(bits, axis=-1, bitorder="little"), bitmask):
        raise damaged(name, "its bitmask has bits beyond the end of a row")
    if OFFSETS in parts:
        counts = bits.sum(axis=-1, dtype=np.int64)
        offsets = np.cumsum(counts, axis=0).reshape(counts.shape) - counts
        if not np.array_equal(parts[OFFSETS].numpy(), offsets):
            raise damaged(name, "its row_offsets are not those of its bitmask")
    elif values.shape != (shape[0], shape[-1] // 2) or len(shape) != 2 or bits.size % 4:
        raise damaged(name, f"its 2:4 values have the shape {tuple(values.shape)}, for a weight of {shape}")
    elif not bool((bits.reshape(-1, 4).sum(axis=1) == 2).all()):
        raise damaged(name, "its bitmask is not 2:4")
    kept = torch.from_numpy(bits.view(bool))
    if int(kept.sum()) != values.numel():
        raise damaged(name, f"its bitmask has {int(kept.sum()):,} bits, for {values.numel():,} values")
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[kept] = values.flatten()
    return weight
