"""A tiny model of every family of image models, and what has to hold for each: pruned, saved, compressed, run."""

from dataclasses import dataclass, field

import torch
import transformers
from transformers import set_seed

from support.models import TINY_VIT

VIT = {**TINY_VIT, "num_channels": 3, "num_labels": 3}
PYRAMID = {"image_size": 32, "hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
SWIN = {"depths": [2, 1], "num_heads": [2, 2], "embed_dim": 8, "image_size": 16, "patch_size": 2, "window_size": 4}
CONVNEXT = {"depths": [1] * 4, "hidden_sizes": [4, 8, 8, 8]}
RESNET = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8}


@dataclass(frozen=True)
class Family:
    """A class of transformers with a config that makes it tiny.

    Attributes:
        kind: name of the class.
        config: arguments of its config.
        side: of its images.
        targets: how many there are.
        unpatterned: names (fnmatch) of the targets whose rows 2:4 does not divide.
        include: names (fnmatch) of the targets that are meant, None for all.
        noise: on the weights; so large that gradients do not vanish in a deep one.
    """

    kind: str
    config: dict
    side: int
    targets: int
    unpatterned: list[str] = field(default_factory=list)
    include: list[str] | None = None
    noise: float = 0.2

    def build(self) -> transformers.PreTrainedModel:
        """Return the model in eval mode, with weights that no initialisation has left near 0."""
        set_seed(0)
        kind = getattr(transformers, self.kind)
        return perturbed(kind(kind.config_class(**self.config)), self.noise)


def perturbed(model: transformers.PreTrainedModel, noise: float = 0.2) -> transformers.PreTrainedModel:
    """Return a model in eval mode, with noise on its parameters and on what its batch norm remembers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return model.eval()


CLASSIFIERS = {
    "ViT": Family("ViTForImageClassification", VIT, 8, 12),
    "DeiT": Family("DeiTForImageClassification", VIT, 8, 12),
    "DeiT, distilled": Family("DeiTForImageClassificationWithTeacher", VIT, 8, 12),
    "BEiT": Family(
        "BeitForImageClassification", {**VIT, "use_relative_position_bias": True, "out_indices": [1]}, 8, 12
    ),
    "DINOv2": Family("Dinov2ForImageClassification", {**VIT, "use_swiglu_ffn": True}, 8, 14),
    "DINOv2 with registers": Family(
        "Dinov2WithRegistersForImageClassification", {**VIT, "num_register_tokens": 2}, 8, 12
    ),
    "Swin": Family("SwinForImageClassification", SWIN, 16, 19),
    "Swinv2": Family("Swinv2ForImageClassification", SWIN, 16, 19),
    "ConvNeXt": Family("ConvNextForImageClassification", CONVNEXT, 32, 15, ["*.dwconv"]),
    "ConvNeXtV2": Family("ConvNextV2ForImageClassification", CONVNEXT, 32, 15, ["*.dwconv"]),
    "ResNet": Family("ResNetForImageClassification", {**RESNET, "layer_type": "bottleneck"}, 16, 8),
    "RegNet": Family("RegNetForImageClassification", {**RESNET, "groups_width": 4}, 16, 12, ["*.attention.2"]),
    "EfficientNet": Family(
        "EfficientNetForImageClassification",
        {
            "image_size": 32,
            "width_coefficient": 0.1,
            "depth_coefficient": 0.1,
            "hidden_dim": 128,
            "in_channels": [32, 16],
            "out_channels": [16, 24],
            "kernel_sizes": [3, 5],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 6],
            "depthwise_padding": [],
            "num_hidden_layers": 8,
        },
        32,
        10,
        ["*.depthwise_conv", "*.squeeze_excite.*"],
    ),
    "MobileNetV2": Family(
        "MobileNetV2ForImageClassification",
        {"image_size": 32, "depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4},
        32,
        49,
        ["*.conv_3x3.convolution"],
    ),
    "MobileViT": Family(
        "MobileViTForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 4, 8, 8, 8, 8],
            "num_attention_heads": 2,
            "patch_size": 2,
        },
        32,
        88,
        ["*.conv_3x3.convolution"],
        noise=0.6,
    ),
    "LeViT": Family(
        "LevitForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [1, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
        },
        32,
        22,
    ),
    "PVT": Family(
        "PvtForImageClassification",
        {**PYRAMID, "mlp_ratios": [2] * 4, "sequence_reduction_ratios": [4, 2, 1, 1]},
        32,
        26,
    ),
    "PVTv2": Family("PvtV2ForImageClassification", {**PYRAMID, "mlp_ratios": [2] * 4}, 32, 31, ["*.dwconv.dwconv"]),
    "Hiera": Family(
        "HieraForImageClassification",
        {
            "image_size": [32, 32],
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "query_stride": [2, 2],
            "masked_unit_size": [2, 2],
            "mlp_ratio": 2.0,
        },
        32,
        9,
    ),
    "ViT-MSN": Family("ViTMSNForImageClassification", VIT, 8, 12),
    "SigLIP": Family("SiglipForImageClassification", {"vision_config": VIT, "num_labels": 3}, 8, 12),
    "CLIP": Family("CLIPForImageClassification", {"vision_config": VIT, "num_labels": 3}, 8, 12),
}


HIERA = CLASSIFIERS["Hiera"].config
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 8,
}
BACKBONES = {
    "DINOv2": Family("Dinov2Model", VIT, 8, 12),
    "DINOv2 with registers": Family("Dinov2WithRegistersModel", {**VIT, "num_register_tokens": 2}, 8, 12),
    "DINOv3": Family("DINOv3ViTModel", {**VIT, "num_register_tokens": 2}, 8, 12),
    "DINOv3 ConvNeXt": Family("DINOv3ConvNextModel", CONVNEXT, 32, 15, ["*.depthwise_conv"]),
    "BEiT": Family("BeitModel", {**VIT, "out_indices": [1]}, 8, 12),
    "ViT-MSN": Family("ViTMSNModel", VIT, 8, 12),
    "ViT-MAE": Family("ViTMAEModel", VIT, 8, 12),
    "ViT-MAE with its decoder": Family(
        "ViTMAEForPreTraining",
        {
            **VIT,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
        8,
        12,
    ),
    "Hiera": Family("HieraModel", HIERA, 32, 9),
    "Swin": Family("SwinModel", SWIN, 16, 19),
    "ResNet": Family("ResNetModel", {**RESNET, "layer_type": "basic"}, 16, 6),
    "SigLIP tower": Family("SiglipVisionModel", VIT, 8, 12),
    "SigLIP": Family("SiglipModel", {"vision_config": VIT, "text_config": TEXT}, 8, 12),
    "CLIP tower": Family("CLIPVisionModel", VIT, 8, 12),
    "CLIP tower with projection": Family("CLIPVisionModelWithProjection", {**VIT, "projection_dim": 8}, 8, 12),
    "CLIP": Family("CLIPModel", {"vision_config": VIT, "text_config": TEXT, "projection_dim": 8}, 8, 12),
    "DPT on DINOv2": Family(
        "DPTForDepthEstimation",
        {
            "backbone_config": transformers.Dinov2Config(
                **VIT, out_features=["stage1", "stage2"], reshape_hidden_states=False
            ),
            "neck_hidden_sizes": [8, 8],
            "fusion_hidden_size": 8,
            "reassemble_factors": [1, 1],
        },
        8,
        12,
        include=["backbone.*"],
    ),
    "UperNet on ConvNeXt": Family(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": transformers.ConvNextConfig(
                **CONVNEXT, out_features=["stage1", "stage2", "stage3", "stage4"]
            ),
            "hidden_size": 8,
            "pool_scales": [1],
            "auxiliary_channels": 8,
            "auxiliary_in_channels": 8,
        },
        32,
        15,
        ["*.dwconv"],
        include=["backbone.*"],
    ),
}


def batches(family: Family, classes: int = 2, sizes: tuple[int, ...] = (4, 4)) -> list[dict[str, torch.Tensor]]:
    """Return batches of random pixels and labels."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(size, 3, family.side, family.side, generator=generator),
            "labels": torch.randint(0, classes, (size,), generator=generator),
        }
        for size in sizes
    ]
