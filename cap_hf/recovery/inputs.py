"""What a trainer is given: a model that can be trained, batches with images, labels where there are some."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from cap_hf.collection.batches import named
from cap_hf.errors import CAPError, foreign_line
from cap_hf.models import usable_of_transformers
from cap_hf.recovery.losses import NO_LABEL

logger = logging.getLogger(__name__)


def trainable(model: Any) -> PreTrainedModel:
    """Return a model without what wraps it: accelerate wraps it as the training needs it.

    Raises:
        CAPError: it cannot be used as it is, loses small steps, or is frozen.
    """
    found = usable_of_transformers(model)
    if not any(parameter.requires_grad for parameter in found.parameters()):
        raise CAPError("every weight of the model is frozen, as a teacher's are: model.requires_grad_(True)")
    if any(parameter.dtype == torch.float16 for parameter in found.parameters()):
        raise CAPError(
            "the model is in torch.float16, which loses the small steps of a training: load it in float32 (fp16=True "
            "or bf16=True then computes in half precision)"
        )
    if "_orig_mod" in model._modules:
        logger.warning("The model is trained without its torch.compile: torch_compile=True in the arguments has one.")
    return found


def collated(collate: Callable[[list[Any]], dict[str, Any]], examples: list[Any]) -> dict[str, Any]:
    """Return the batch that a collator makes of examples; of pairs, as a TensorDataset has them, one with names.

    Raises:
        CAPError: it makes none, or one without images.
    """
    try:
        batch = collate([named(example) for example in examples])
    except CAPError:
        raise
    except Exception as error:
        raise CAPError(
            f"no batch can be made of examples of type {type(examples[0]).__name__} ({foreign_line(error)}): give "
            "dicts of pixel_values and labels, or a data_collator that makes them"
        ) from error
    if not isinstance(batch, Mapping) or "pixel_values" not in batch:
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise CAPError(f"a batch has no pixel_values but {found}: set remove_unused_columns=False, or name them so")
    return batch


def has_labels(inputs: dict[str, Any], names: list[str]) -> bool:
    """Return whether a batch has labels under any of the names; -100 is none."""
    found = [torch.as_tensor(inputs[name]) for name in names if name in inputs and not isinstance(inputs[name], list)]
    return any((each != NO_LABEL).any() for each in found) or any(isinstance(inputs.get(name), list) for name in names)
