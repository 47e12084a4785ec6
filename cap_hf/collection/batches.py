"""What a batch of calibration examples is: a dict of tensors, made from what data come in elsewhere."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, SequentialSampler

from cap_hf.collection.running import Batch
from cap_hf.errors import CAPError, foreign_line
from cap_hf.failures import is_for_others

# Names that transformers' own collator takes for labels too.
LABEL_NAMES = ("labels", "label", "label_ids")


def check_dataloader(dataloader: object) -> None:
    """Raise a CAPError if something is a batch, or nothing at all, in the place of batches."""
    if isinstance(dataloader, (Mapping, torch.Tensor, np.ndarray)):
        raise CAPError("one batch was given in the place of a dataloader: put it into a list")
    if isinstance(dataloader, (str, bytes)) or not isinstance(dataloader, Iterable):
        raise CAPError(f"{dataloader!r:.80} is no dataloader: give a DataLoader, or a list of batches")


def read(dataloader: Iterable[Any]) -> Iterator[Any]:
    """Yield what a dataloader yields.

    Raises:
        CAPError: its dataset or its collator has failed; the message says at which batch, and of what.
    """
    number = 0
    try:
        for batch in dataloader:
            yield batch
            number += 1
    except CAPError:
        raise
    except Exception as error:
        if is_for_others(error):
            raise
        raise CAPError(f"the dataloader failed at {place(dataloader, number)}: {foreign_line(error)}") from error


def place(dataloader: Iterable[Any], number: int) -> str:
    """Return which batch one is, and which examples it is made of where a dataloader has them in order."""
    size = getattr(dataloader, "batch_size", None)
    if isinstance(dataloader, DataLoader) and isinstance(dataloader.sampler, SequentialSampler) and size:
        return f"batch {number} (examples {number * size} to {number * size + size - 1})"
    return f"batch {number}"


def to_batch(given: object, needed: Sequence[str], taken: Collection[str] = ()) -> Batch:
    """Return a batch as a dict of tensors with one entry per example.

    A pair, as a TensorDataset has it, is pixels and labels; arrays and lists of numbers become tensors. What the model
    has no use for, such as a column of file names or the number of an epoch, is left out.

    Args:
        given: what a dataloader yields.
        needed: the names that must be there, `pixel_values` among them.
        taken: further names that the model can be called with, see `cap_hf.towers.taken_by`; labels always count.

    Raises:
        CAPError: it is no batch, something that is needed is missing, or what the model takes are not tensors of one
            length.
    """
    given = named(given)
    wanted = "give dicts of tensors with " + " and ".join(needed)
    if not isinstance(given, Mapping):
        raise CAPError(f"a batch is a {type(given).__name__}: {wanted}")
    found = {str(name): value for name, value in given.items() if value is not None}
    for name in LABEL_NAMES[1:]:
        if name in found:
            found.setdefault("labels", found.pop(name))
    if any(name not in found for name in needed):
        raise CAPError(
            f"a batch has {', '.join(sorted(found)) or 'nothing in it'}; it needs {' and '.join(needed)}, so named"
        )
    batch = {}
    for name in ("pixel_values", *sorted({"labels", *taken} & found.keys() - {"pixel_values"})):
        tensor = to_tensor(found[name])
        if tensor is None or not tensor.dim():
            raise CAPError(f"{name!r} of a batch is {describe(found[name])}: give a tensor with one entry per example")
        batch[name] = tensor
    length = len(batch["pixel_values"])
    for name, tensor in batch.items():
        if len(tensor) != length:
            raise CAPError(f"a batch has {length} pixel_values and {len(tensor)} {name}: give as many")
    return batch


def joined(batches: Iterable[Batch]) -> Batch:
    """Return all examples of some batches as one, without labels; empty where there is none.

    Raises:
        CAPError: they differ in size, or one has a tensor that another lacks.
    """
    parts = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    shapes = {tuple(sorted((name, tuple(value.shape[1:])) for name, value in part.items())) for part in parts}
    if len(shapes) > 1:
        # A set of few: one line.
        found = " and ".join(str(dict(shape)) for shape in sorted(shapes)[:2])
        raise CAPError(
            f"all examples go through the model at once, and these differ in size, {found}: make them of one size, or "
            "leave the refit out (--refit false), and batch norm as it is (--recalibrate_batch_norm false)"
        )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def named(given: Any) -> Any:
    """Return pixels, alone or in a pair with labels, under their names; anything else as it is."""
    if isinstance(given, (torch.Tensor, np.ndarray)) and given.ndim > 2:
        return {"pixel_values": given}
    pair = given if type(given) in (tuple, list) and len(given) in (1, 2) else ()
    if pair and isinstance(pair[0], (torch.Tensor, np.ndarray)) and pair[0].ndim > 2:
        return dict(zip(("pixel_values", "labels"), pair, strict=False))
    return given


def to_tensor(value: Any) -> torch.Tensor | None:
    """Return numbers as a tensor, those of equally large tensors in a list stacked; None of what is no numbers.

    PyTorch takes no array in another byte order, with a negative stride (as flipped images have) or of more than 64
    bits: such a one is copied.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, torch.Tensor) for each in value):
        return torch.stack(list(value)) if len({each.shape for each in value}) == 1 else None
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths, or objects that make no array
        return None
    if array.dtype.kind not in "biuf":
        return None
    dtype = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, dtype, ["C_CONTIGUOUS", "WRITEABLE"]))


def describe(value: Any) -> str:
    """Return what something is, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a single number, {value.item()}"
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"a {type(value).__name__}"
