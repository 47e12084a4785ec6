"""Parts of a target, for one whose sums are too large for a pass: of what each process owns of it, an equal share."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

import torch

from cap_hf.collection.shares import own_blocks
from cap_hf.distributed.processes import Processes
from cap_hf.targets import Target

# In memory or on the disk.
Tensors = MutableMapping[str, torch.Tensor]
# Makes them for a name.
MakeTensors = Callable[[str], Tensors]


def within(target: Target, processes: Processes) -> slice:
    """Return where the blocks of a target, or of a part of it, are among all those of it that this process owns."""
    own, first = own_blocks(target, processes), own_blocks(target.whole, processes).start
    return slice(own.start - first, own.stop - first)


def parts_of(target: Target, count: int) -> list[Target]:
    """Return a target in so many parts, which have alike numbers of chunks in each process."""
    return [replace(target, part=(number, count)) for number in range(count)]


def key_of(target: Target) -> str:
    """Return what tensors of a target, or of a part of it, lie under: its name, with the part's."""
    number, count = target.part
    return target.name if count == 1 else f"{target.name}.part-{number + 1}-of-{count}"


def join(groups: Sequence[Sequence[Target]], *tensors: Tensors) -> None:
    """Put what lies under the parts of targets together, under the targets' names.

    No part goes before all wholes of its target are there: an interrupted run finds the ones or the others.

    Args:
        groups: of targets and parts of them, in the order of the parts.
        tensors: of all targets, or of all of their parts.
    """
    parts: dict[str, list[str]] = {}
    for target in (target for each in groups for target in each if key_of(target) != target.name):
        parts.setdefault(target.name, []).append(key_of(target))
    for name, keys in parts.items():
        for each in tensors:
            if name not in each:
                each[name] = torch.cat([each[key] for key in keys])
        for each in tensors:
            for key in keys:
                if key in each:
                    del each[key]
