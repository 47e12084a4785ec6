"""What a model is for, as the Hub and transformers call it, and what it is loaded with."""

import transformers
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
)

from cap_hf.towers import is_classifier, tower_name

CLASSIFICATION, FEATURES = "image-classification", "image-feature-extraction"
# The end of a class's name says what its head is for.
HEADS = {
    "ForZeroShotObjectDetection": "zero-shot-object-detection",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "ForSemanticSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForImageSegmentation": "image-segmentation",
}
ZERO_SHOT = "zero-shot-image-classification"


def pipeline_tag(model: PreTrainedModel) -> str:
    """Return the name of the pipeline that a model is for; without a head it gives features."""
    if is_classifier(model):
        return CLASSIFICATION
    name = type(model).__name__
    if name in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        return ZERO_SHOT
    return next((tag for end, tag in HEADS.items() if name.endswith(end)), FEATURES)


def loader_name(model: PreTrainedModel) -> str:
    """Return the class of transformers to load a model with.

    That is an Auto class where this gives the class of the model, or where transformers does not know it, and else the
    model's own: `AutoModel` would take the head off, and of a model with several towers the class says which they are.
    """
    if is_classifier(model):
        return "AutoModelForImageClassification"
    name = type(model).__name__
    if MODEL_MAPPING.get(type(model.config), None) is type(model) and not tower_name(model):
        return AutoModel.__name__
    return name if hasattr(transformers, name) else AutoModel.__name__


def purpose(tag: str) -> str:
    """Return what a model with a pipeline tag is, behind the name of its class: ` for image classification`."""
    if tag == FEATURES:
        return ", a vision backbone"
    return f" for {tag.replace('-', ' ').replace('zero shot', 'zero-shot')}"
