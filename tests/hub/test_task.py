"""What a model is for is known by its class, and what it is loaded with gives that class."""

import pytest
import transformers
from support.backbones import IMAGE, TINY, tiny_clip, tiny_dinov2
from support.models import build
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTMAEConfig, ViTMAEForPreTraining

from cap_hf.hub.task import loader_name, pipeline_tag, purpose


@pytest.mark.parametrize(
    ("make", "tag", "loader"),
    [
        (lambda: build("ViT"), "image-classification", "AutoModelForImageClassification"),
        (tiny_dinov2, "image-feature-extraction", "AutoModel"),
        (lambda: CLIPVisionModel(CLIPVisionConfig(**TINY, **IMAGE)), "image-feature-extraction", "AutoModel"),
        (tiny_clip, "zero-shot-image-classification", "CLIPModel"),
        (
            lambda: ViTMAEForPreTraining(ViTMAEConfig(**TINY, **IMAGE, decoder_num_attention_heads=2)),
            "image-feature-extraction",
            "ViTMAEForPreTraining",
        ),
    ],
)
def test_models(make, tag, loader, tmp_path):
    model = make()
    assert (pipeline_tag(model), loader_name(model)) == (tag, loader)
    model.save_pretrained(tmp_path)
    assert type(getattr(transformers, loader).from_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("DPTForDepthEstimation", "depth-estimation"),
        ("SegformerForSemanticSegmentation", "image-segmentation"),
        ("Mask2FormerForUniversalSegmentation", "image-segmentation"),
        ("DetrForObjectDetection", "object-detection"),
        ("OwlViTForObjectDetection", "zero-shot-object-detection"),
        ("GroundingDinoForObjectDetection", "zero-shot-object-detection"),
    ],
)
def test_the_name_of_a_class_says_what_its_head_is_for(name, tag):
    kind = getattr(transformers, name)
    assert pipeline_tag(kind.__new__(kind)) == tag


def test_purposes():
    assert purpose("image-feature-extraction") == ", a vision backbone"
    assert purpose("zero-shot-image-classification") == " for zero-shot image classification"
    assert purpose("depth-estimation") == " for depth estimation"
