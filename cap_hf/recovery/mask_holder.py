"""Keep a model's zeros at zero while an optimizer trains it, and count them."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cap_hf.errors import CAPError
from cap_hf.masks import Masks, apply_masks, take_masks, target_sparsity, verify_masks
from cap_hf.targets import Target, find_targets, weight_layers


class MaskHolder:
    """Holds the zeros of a model's Linear and Conv2d weights, by hooks on the optimizer's step and on gradients.

    Whatever lets a weight move - momentum, decay, a step of the optimizer - the step's hook sets it back to 0 before
    anyone sees it. Gradients of pruned weights are 0 too: otherwise they would count in gradient clipping, where at
    high sparsity they are most of the norm.

    Args:
        model: where the masks come from: a weight that is exactly 0 is pruned. Layers outside the encoder count as
            well (a checkpoint made elsewhere may have pruned them), except ones that are all 0: those are new.

    Raises:
        CAPError: the model has no targets.
    """

    def __init__(self, model: nn.Module) -> None:
        self.candidates = [
            Target(name, module, block_size=module.weight[0].numel()) for name, module in weight_layers(model).items()
        ]
        self.targets = {target.name for target in find_targets(model)}
        self.held: list[Target] = []
        self.masks: Masks = {}
        self._handles: list[RemovableHandle] = []
        self._gradient_handles: list[RemovableHandle] = []
        self.take()

    def take(self) -> None:
        """Hold the weights that are 0 now."""
        masks = take_masks(self.candidates)
        # A layer without zeros costs nothing.
        self.held = [
            target
            for target in self.candidates
            if not masks[target.name].all() and (target.name in self.targets or masks[target.name].any())
        ]
        self.masks = {target.name: masks[target.name] for target in self.held}
        if self._handles:
            self._hook_gradients()

    def verify(self, model: nn.Module | None = None) -> None:
        """Raise a CAPError that names the layers with a pruned weight that is not 0.

        Args:
            model: another model of the same structure, such as an average; None for the model itself.
        """
        targets = self.held
        if model is not None:
            layers = weight_layers(model)
            targets = [Target(target.name, layers[target.name], target.block_size) for target in targets]
        verify_masks(targets, self.masks)

    def attach(self, optimizer: Optimizer) -> None:
        """Hold the masks whenever this optimizer takes a step, and no longer for one that was attached before."""
        self.detach()
        # accelerate wraps the optimizer; with a gradient scaler only the inner one knows which steps are taken.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not hasattr(optimizer, "register_step_post_hook"):
            raise CAPError(f"{type(optimizer).__name__} has no step hooks to hold the masks with: choose another optim")
        self._handles = [optimizer.register_step_post_hook(lambda *_: apply_masks(self.held, self.masks))]
        self._hook_gradients()

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in (*self._handles, *self._gradient_handles):
            handle.remove()
        self._handles, self._gradient_handles = [], []

    @torch.no_grad()
    def clear_state(self, optimizer: Optimizer) -> None:
        """Forget the momentum of pruned weights, whatever the optimizer calls it."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        for target in self.held:
            for value in optimizer.state.get(target.weight, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == target.weight.shape:
                    value.masked_fill_(~self.masks[target.name], 0)

    def _hook_gradients(self) -> None:
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient_handles = [
            target.weight.register_hook(_gradient_mask(self.masks[target.name]))
            for target in self.held
            if target.weight.requires_grad
        ]


def model_sparsity(model: nn.Module) -> float:
    """Return the share of a model's target weights that are 0."""
    return target_sparsity(find_targets(model))


def _gradient_mask(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    removed = ~mask
    return lambda gradient: gradient.masked_fill(removed, 0)
