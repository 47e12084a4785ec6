"""What an image model gives back, however it packs that: logits, features, and what its classes are called."""

from typing import Any

import torch
from transformers import PretrainedConfig

from cap_hf.errors import CAPError

# What a model that ends in something else than features gives, for every position or query of an image.
DENSE_OUTPUTS = (
    "predicted_depth",
    "logits",
    "pred_boxes",
    "pred_masks",
    "masks_queries_logits",
    "class_queries_logits",
)
# The parts that features can have.
FEATURE_KINDS = ("class", "patch", "pooled")


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


def features_of(outputs: Any, prefix_tokens: int = 0) -> dict[str, torch.Tensor]:
    """Return the features in a model's outputs, by part: `class`, `patch` and `pooled`, as far as it has them.

    Of a backbone these are the class token, the tokens (or positions) of the image, and what the model pools them to.
    A model that ends in something else (depth, segmentation, detection) has that for its `patch` features, a classifier
    its logits for `pooled`. Register tokens, which nobody reads, are left out.

    Args:
        outputs: named outputs of a transformers model.
        prefix_tokens: how many tokens stand before those of the image; the first is the class token.

    Returns:
        `(b, n, d)` of each part, n positions of d channels; several parts of one kind are `patch`, `patch 1`, ...

    Raises:
        CAPError: there are none.
    """
    found: dict[str, torch.Tensor] = {}
    dense = [getattr(outputs, name, None) for name in DENSE_OUTPUTS]
    for each in dense:
        if isinstance(each, torch.Tensor):
            if each.dim() == 2:
                found["pooled"] = each[:, None]
            else:
                found[next_name("patch", found)] = positions_of(each)
    if found:
        return found
    tokens = getattr(outputs, "last_hidden_state", None)
    maps = getattr(outputs, "feature_maps", None)
    for each in maps if maps is not None else [tokens]:
        if not isinstance(each, torch.Tensor):
            continue
        positions = positions_of(each)
        if each.dim() == 3 and prefix_tokens:
            found.setdefault("class", positions[:, :1])
            positions = positions[:, prefix_tokens:]
        if positions.shape[1]:
            found[next_name("patch", found)] = positions
    for name in ("image_embeds", "pooler_output"):
        pooled = getattr(outputs, name, None)
        if isinstance(pooled, torch.Tensor):
            found["pooled"] = pooled.flatten(1)[:, None]
            break
    if not found:
        raise CAPError(f"the model returns {type(outputs).__name__}, in which nothing known is a feature of an image")
    return found


def main_output(outputs: Any) -> tuple[str, torch.Tensor]:
    """Return what a model is called for, and its name: logits, what it predicts, else its tokens or features.

    Raises:
        CAPError: there is nothing of the kind.
    """
    for name in (*DENSE_OUTPUTS, "last_hidden_state", "feature_maps", "image_embeds", "pooler_output"):
        found = getattr(outputs, name, None)
        if name == "feature_maps" and found is not None:
            found = found[-1]
        if isinstance(found, torch.Tensor):
            return name, found
    raise CAPError(f"the model returns {type(outputs).__name__}, with neither logits nor features in it")


def next_name(kind: str, taken: dict[str, torch.Tensor]) -> str:
    """Return the name of the next part of a kind: `patch`, `patch 1`, ..."""
    number = sum(name.split()[0] == kind for name in taken)
    return f"{kind} {number}" if number else kind


def positions_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return features as `(b, n, d)`: `(b, n, d)` as it is, `(b, d, h, w)` with its positions in rows, `(b, d)` as one.

    A map without channels, `(b, h, w)`, cannot be told from tokens: its rows are taken for these.
    """
    if tensor.dim() == 4:
        return tensor.flatten(2).mT
    return tensor if tensor.dim() == 3 else tensor.flatten(1)[:, None]


def other_task(classifier: Any) -> str | None:
    """Return what a classifier does in place of picking one label of several, by its config; None if it does that.

    As transformers has it, a single output without a `problem_type` is a regression.
    """
    number, problem = len(label_names(classifier.config)), classifier.config.problem_type
    if problem not in (None, "single_label_classification"):
        return str(problem)
    return {0: "no labels", 1: "regression"}.get(number)


def check_task(classifier: Any, what: str, advice: str) -> None:
    """Raise a CAPError unless a classifier picks one label of several, which `what` is for."""
    task = other_task(classifier)
    if task is not None:
        raise CAPError(
            f"{what} for models that pick one label of several, and {type(classifier).__name__} is for {task}: {advice}"
        )


def label_names(config: PretrainedConfig) -> dict[int, str]:
    """Return the names of a classifier's classes by their numbers, ascending; none where its config has no classes."""
    return dict(sorted((int(index), str(name)) for index, name in (config.id2label or {}).items()))
