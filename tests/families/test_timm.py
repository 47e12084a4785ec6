"""timm's models behind transformers' TimmWrapper: fused qkv, class attention, depthwise convolutions, EfficientNet."""

import pytest
import torch
from support.lifecycle import (
    assert_gradient_samples,
    assert_recovers,
    assert_runs_sparse,
    assert_survives_the_disk,
    assert_two_four,
    prune,
)

from cap_hf import find_targets
from cap_hf.collection.batch_norm import batch_norms, recalibrate_batch_norm
from cap_hf.distributed.processes import Processes
from cap_hf.targets import left_alone

pytest.importorskip(
    "timm", reason="timm is not installed here: `bash scripts/timm.sh` makes where it is, and runs this"
)

from support import timm_models

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}

# Architecture, arguments of timm, side of the images, number of targets, targets whose rows 2:4 does not divide.
MODELS = {
    "ViT, fused qkv": ("vit_tiny_patch16_224", TINY, 16, 8, []),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", TINY, 16, 8, []),
    "XCiT, class attention": (
        "xcit_nano_12_p8_224",
        {**TINY, "patch_size": 8, "img_size": 32},
        32,
        24,
        ["*.local_mp.*"],
    ),
    "ConvNeXt": ("convnext_atto", {"depths": [1] * 4, "dims": [4, 8, 8, 8]}, 32, 15, ["*.conv_dw"]),
    "ResNet": ("resnet10t", {"channels": [8, 8, 8, 8]}, 32, 12, []),
    "EfficientNet": ("test_efficientnet", {}, 32, 16, ["*.conv_dw", "*.se.*"]),
}
models = pytest.mark.parametrize("name", MODELS)


def batches(side):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(4, 3, side, side, generator=generator),
            "labels": torch.randint(0, 3, (4,), generator=generator),
        }
        for _ in range(2)
    ]


@models
def test_gradient_samples_are_those_of_single_examples(name):
    architecture, arguments, side, count, _ = MODELS[name]
    model = timm_models.build(architecture, **arguments)
    assert len(find_targets(model)) == count
    assert_gradient_samples(model, batches(side)[0])


@models
def test_pruned_saved_compressed_and_run(name, tmp_path):
    architecture, arguments, side, *_ = MODELS[name]
    data = batches(side)
    compressor = prune(timm_models.build(architecture, **arguments), data, 0.6)
    assert_survives_the_disk(compressor, data[0], tmp_path)
    assert_runs_sparse(compressor.model, data[0])


@models
def test_without_a_head_it_is_pruned_by_its_features(name, tmp_path):
    architecture, arguments, side, *_ = MODELS[name]
    data = [{"pixel_values": batch["pixel_values"]} for batch in batches(side)]
    assert_gradient_samples(timm_models.build(architecture, head=False, **arguments), data[0])
    compressor = prune(timm_models.build(architecture, head=False, **arguments), data, 0.6)
    assert compressor.config.fisher_loss == "features"
    assert_survives_the_disk(compressor, data[0], tmp_path)


@models
def test_a_step_of_recovery_holds_the_zeros(name, tmp_path):
    architecture, arguments, side, *_ = MODELS[name]
    data = batches(side)
    assert_recovers(prune(timm_models.build(architecture, **arguments), data, 0.6, method="magnitude"), data, tmp_path)


@models
def test_two_of_four(name):
    architecture, arguments, side, _, unpatterned = MODELS[name]
    assert_two_four(timm_models.build(architecture, **arguments), batches(side), unpatterned)


def test_layers_that_pad_their_input_themselves_are_left_alone_and_named():
    model = timm_models.build("tf_efficientnet_b0")
    reasons = left_alone(model, find_targets(model))
    assert reasons["timm_model.blocks.1.0.conv_dw"] == "Conv2dSame does not compute as its base class does"
    assert (
        reasons["timm_model.classifier"]
        == reasons["timm_model.conv_stem"]
        == "an embedding, a pooler, a decoder or a head"
    )
    assert len(reasons) == 6


def test_batch_norm_with_activation_is_estimated_anew():
    model = timm_models.build("test_efficientnet")
    names = recalibrate_batch_norm(model, batches(32), Processes())
    assert names == list(batch_norms(model))
    assert "timm_model.blocks.1.0.bn1" in names
    norm = model.timm_model.bn1
    pixels = torch.cat([batch["pixel_values"] for batch in batches(32)])
    with torch.no_grad():
        values = model.timm_model.conv_stem(pixels).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, values.var(1), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    """timm's models compute again even in eval mode; then no gradient would reach the hooks."""
    architecture, arguments, side, *_ = MODELS["ViT, fused qkv"]
    plain, saving = (timm_models.build(architecture, **arguments) for _ in range(2))
    saving.gradient_checkpointing_enable()
    assert saving.timm_model.grad_checkpointing
    for model in (plain, saving):
        prune(model, batches(side), 0.6)
    assert saving.timm_model.grad_checkpointing
    assert all(torch.equal(value, saving.state_dict()[name]) for name, value in plain.state_dict().items())
