"""What an image classifier gives back, however it packs that, and what its classes are called."""

from typing import Any

import torch
from transformers import PretrainedConfig

from cap_hf.errors import CAPError


def logits_of(outputs: Any) -> torch.Tensor:
    """Return the logits `(b, classes)` of a classifier's outputs, named or (with `return_dict=False`) in a tuple.

    Raises:
        CAPError: there are none.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None and isinstance(outputs, tuple) and outputs:
        # Called without labels, a classifier of transformers gives its logits first.
        logits = outputs[0]
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise CAPError(
            f"the model returns {type(outputs).__name__} without logits (b, classes): use an image classifier"
        )
    return logits


def label_names(config: PretrainedConfig) -> dict[int, str]:
    """Return the names of a classifier's classes by their numbers, ascending; none where its config has no classes."""
    return dict(sorted((int(index), str(name)) for index, name in (config.id2label or {}).items()))
