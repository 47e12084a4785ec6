"""The part of a model that is trained where there is no head: what sees images, and the features that it gives."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cap_hf.outputs import features_of
from cap_hf.towers import prefix_tokens, see, tower_of

Features = dict[str, torch.Tensor]


class Tower:
    """What of a model sees images: the model itself, or the vision tower of one that also reads.

    Whatever wraps a model for training (DDP, autocast, a compiler) calls the model, and what sums gradients over
    processes does so only of what it was called with. So while a tower is trained, calling its model calls the tower.

    Args:
        model: of transformers; it stays whole, and is what is wrapped and saved.

    Raises:
        CAPError: no part of the model takes images.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.module = model, tower_of(model)
        self.prefix_tokens = prefix_tokens(model)
        self._entered = False

    def features(
        self, batch: Mapping[str, torch.Tensor], hidden_states: bool = False, through: nn.Module | None = None
    ) -> tuple[Features, tuple[torch.Tensor, ...]]:
        """Return the features of a batch of images, as `features_of` does, and the hidden states if they are asked for.

        Args:
            batch: `pixel_values`, and what else the model's image processor makes.
            hidden_states: return those as well.
            through: the model as it is wrapped for training; None for the model itself.
        """
        with self.called():
            outputs = see(self.model, batch, through, output_hidden_states=hidden_states)
        states = tuple(getattr(outputs, "hidden_states", None) or ()) if hidden_states else ()
        return features_of(outputs, self.prefix_tokens), states

    @contextmanager
    def called(self) -> Iterator[None]:
        """Inside the context calling the model calls the tower; entered again it changes nothing."""
        if self._entered or self.module is self.model:
            yield
            return

        # The Trainer reads off the signature which inputs a model takes.
        @wraps(self.module.forward)
        def forward(*args: Any, **inputs: Any) -> Any:
            return self.module(*args, **inputs)

        before, self._entered = self.model.__dict__.get("forward"), True
        self.model.forward = forward
        try:
            yield
        finally:
            self._entered = False
            del self.model.forward
            if before is not None:
                self.model.forward = before

    @contextmanager
    def trained(self) -> Iterator[None]:
        """Inside the context calling the model calls the tower, and nothing but the tower can learn."""
        own = set(self.module.parameters())
        others = [each for each in self.model.parameters() if each.requires_grad and each not in own]
        for each in others:
            each.requires_grad_(False)
        try:
            with self.called():
                yield
        finally:
            for each in others:
                each.requires_grad_(True)
