"""What of a model a training leaves as it is."""

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cap_hf.targets import find_targets


@contextmanager
def frozen_outside(model: nn.Module) -> Iterator[None]:
    """Inside the context nothing needs a gradient but what lies where the targets are, such as in the encoder.

    Embeddings and heads are never pruned, so they have nothing to recover; and a step that moves them moves all that
    the model makes: of DINOv2 the patch embedding alone has nine tenths of the gradient.
    """
    outside = set(model.parameters()) - set(innermost(model).parameters())
    learning = [parameter for parameter in outside if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def innermost(model: nn.Module) -> nn.Module:
    """Return the innermost module that holds all targets of a model, as `find_targets` names them."""
    paths = [posixpath.dirname(target.name.replace(".", "/")) for target in find_targets(model)]
    return model.get_submodule(posixpath.commonpath(paths).replace("/", "."))
