"""How often a model multiplies each weight for one image: once for every token or position that the layer sees."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cap_hf.errors import CAPError
from cap_hf.models import uncompiled
from cap_hf.targets import Target
from cap_hf.towers import see


def count_positions(
    model: nn.Module, targets: Sequence[Target], example_inputs: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """Return by target how many multiply-adds each of its weights makes for one image; 0 of one that it never reaches.

    What a convolution's kernel finds beyond the border, which is 0, is multiplied too.

    Args:
        model: whose targets they are; what it was, training or not, it is again afterwards.
        targets: Linear and Conv2d weights; all modules that compute with one count.
        example_inputs: what the model is called with; only the first image is looked at.

    Raises:
        CAPError: the model fails on the example, or no target takes part in it.
    """
    positions = dict.fromkeys((target.name for target in targets), 0)

    def watch(name: str, outputs: int, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.shape[dim] != outputs:
                raise CAPError(
                    f"{name} gives {output.shape[dim]} channels and has {outputs}: its positions are unknown"
                )
            positions[name] += output.numel() // outputs

        return hook

    # A convolution's channels come before its positions, a Linear's after its tokens.
    handles = [
        module.register_forward_hook(watch(target.name, len(target.weight), -3 if target.is_conv else -1))
        for target in targets
        for module in target.modules
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    training = model.training
    first = {name: value[:1].to(next(model.parameters()).device) for name, value in example_inputs.items()}
    try:
        with uncompiled(model), torch.inference_mode():
            see(model.eval(), first)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not any(positions.values()):
        raise CAPError(f"no target of {type(model).__name__} takes part in what it makes of an image")
    return positions
