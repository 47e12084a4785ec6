"""What a model is for, as the Hub and transformers call it, and what it is loaded with."""

import transformers
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_MAPPING,
)

from cap_hf.towers import is_classifier, tower_name

CLASSIFICATION, FEATURES = "image-classification", "image-feature-extraction"
# Of classes that do with words what others do with a head of classes: their names, as transformers has them.
ZERO_SHOT = {
    "zero-shot-image-classification": MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "zero-shot-object-detection": MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
}
# Of the others the end of the name says what the head is for.
HEADS = {
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "ForSemanticSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForImageSegmentation": "image-segmentation",
}


def pipeline_tag(model: PreTrainedModel) -> str:
    """Return the name of the pipeline that a model is for; without a head it gives features."""
    if is_classifier(model):
        return CLASSIFICATION
    name = type(model).__name__
    known = [tag for tag, names in ZERO_SHOT.items() if name in names.values()]
    known += [tag for end, tag in HEADS.items() if name.endswith(end)]
    return known[0] if known else FEATURES


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
