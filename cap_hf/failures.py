"""What a model's forward or backward pass raises, in one line: on what it failed, and what it takes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from cap_hf.errors import CAPError, ModelFailure, reason

# Returns the channels, height and width of the images that a model takes.
ShapeOf = Callable[[nn.Module], tuple[int, int, int]]


@contextmanager
def explained(model: nn.Module, inputs: Mapping[str, Any], shape_of: ShapeOf) -> Iterator[None]:
    """Turn what a model's forward or backward pass raises into one line.

    Args:
        model: that is called within.
        inputs: what it is called with, `pixel_values` among them.
        shape_of: says what images it takes.

    Raises:
        ModelFailure: the pass failed. A CAPError from within goes through as it is, and so does what `is_for_others`.
    """
    try:
        yield
    except CAPError:
        raise
    except Exception as error:
        if is_for_others(error):
            raise
        pixels = inputs.get("pixel_values")
        shape = f"{tuple(pixels.shape)}" if isinstance(pixels, torch.Tensor) else f"a {type(pixels).__name__}"
        taken = what_is_taken(model, pixels, shape_of)
        raise ModelFailure(
            f"{type(model).__name__} fails on pixel_values of {shape}{taken}: {reason(error)}"
        ) from error


def what_is_taken(model: nn.Module, pixels: Any, shape_of: ShapeOf) -> str:
    """Return what a model's config says of its images, and what is wrong with some if that can be told."""
    if getattr(getattr(model, "config", None), "model_type", None) is None or not isinstance(pixels, torch.Tensor):
        return ""
    channels, height, width = shape_of(model)
    takes = f"{channels or 'channels'}, {height}, {width}"
    shape = tuple(pixels.shape)
    if pixels.dim() == 3 and shape[0] == channels:
        hint = ": the batch is missing, see unsqueeze(0)"
    elif pixels.dim() == 4 and channels and shape[1] != channels == shape[3]:
        hint = ": channels come first, see permute(0, 3, 1, 2)"
    else:
        hint = ""
    return f" (its config tells of (batch, {takes}){hint})"


def is_for_others(error: Exception) -> bool:
    """Return whether an error is to reach who looks for it: a launcher, or what tries a smaller batch.

    That is an error of a collective, for which another process has ended or is late, and one of too little memory, by
    which accelerate's `find_executable_batch_size` knows that it has to go on.
    """
    return is_of_other_processes(error) or isinstance(error, MemoryError) or should_reduce_batch_size(error)


def is_of_other_processes(error: Exception) -> bool:
    """Return whether an error comes from a collective, and so from another process that has ended or is late."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and "/torch/" in (name := last.tb_frame.f_code.co_filename) and "distributed" in name
