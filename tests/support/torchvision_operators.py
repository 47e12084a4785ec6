"""torchvision beside the CPU torch of constraints.txt.

The compiled operators of PyPI's torchvision are built against a torch with CUDA, and the CPU's cannot load them. Its
Python part, which is all that timm and transformers use for image models, asks for two of them at its import, and
fails. Here the two are declared with nothing behind them: torchvision is imported, and who called one would be told
that it is not implemented. Nothing is done where torchvision is not installed, or works.
"""

from importlib.util import find_spec

import torch

NEEDED = ("nms", "qnms")


def import_torchvision() -> None:
    """Import torchvision, with its operators declared where its own cannot be loaded."""
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in NEEDED:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


if find_spec("torchvision") is not None:
    import_torchvision()
