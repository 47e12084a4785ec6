"""Models that PEFT wraps: one line that says to merge, and merged they are what they are without PEFT."""

import pytest
import torch
from support.families import CLASSIFIERS, batches
from support.lifecycle import prune

from cap_hf import CAPCompressor, CAPError, find_targets

peft = pytest.importorskip("peft", reason="PEFT is not installed here: `bash scripts/timm.sh` makes where it is")


def wrapped():
    model = CLASSIFIERS["ViT"].build()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def test_a_wrapped_model_is_to_be_merged_first():
    with pytest.raises(CAPError, match=r"has adapters \(PEFT\): merge them .* merge_and_unload"):
        CAPCompressor(wrapped())


def test_so_is_one_that_transformers_gave_an_adapter():
    model = CLASSIFIERS["ViT"].build()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CAPError, match=r"ViTForImageClassification has adapters \(PEFT\)"):
        find_targets(model)


def test_merged_it_is_pruned_with_what_the_adapter_has_changed():
    model = wrapped()
    data = batches(CLASSIFIERS["ViT"])
    with torch.no_grad():
        expected = model(data[0]["pixel_values"]).logits
    merged = model.merge_and_unload()
    prune(merged, data, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(merged(data[0]["pixel_values"]).logits, expected, rtol=1e-4, atol=1e-5)
    prune(merged, data, 0.5)
