"""Families of image models, each from a tiny config, through everything that is done with a checkpoint."""

import pytest
import torch
from support.families import BACKBONES, CLASSIFIERS, batches
from support.lifecycle import (
    assert_gradient_samples,
    assert_recovers,
    assert_runs_sparse,
    assert_survives_the_disk,
    assert_two_four,
    prune,
)

from cap_hf import CAPError, NMPattern, find_targets
from cap_hf.targets import left_alone

FAMILIES = CLASSIFIERS | {f"{name}, no classes": family for name, family in BACKBONES.items()}
families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_gradient_samples_are_those_of_single_examples(name):
    family = FAMILIES[name]
    model = family.build()
    assert len(find_targets(model, include=family.include)) == family.targets
    assert_gradient_samples(model, batches(family, sizes=(3,))[0], family.include)


@families
def test_pruned_saved_compressed_and_run(name, tmp_path):
    family = FAMILIES[name]
    data = batches(family)
    compressor = prune(family.build(), data, 0.6, include=family.include)
    assert_survives_the_disk(compressor, data[0], tmp_path)
    assert_runs_sparse(compressor.model, data[0])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_step_of_recovery_holds_the_zeros(name, tmp_path):
    family = CLASSIFIERS[name]
    data = batches(family)
    assert_recovers(prune(family.build(), data, 0.6, method="magnitude"), data, tmp_path)


@families
def test_two_of_four(name):
    family = FAMILIES[name]
    if family.unpatterned:
        with pytest.raises(CAPError, match=r"2:4 does not divide the \d+ input channels of .*--exclude"):
            find_targets(family.build(), include=family.include, pattern=NMPattern(2, 4))
    assert_two_four(family.build(), batches(family), family.unpatterned, family.include)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_what_reads_text_is_unchanged_bit_for_bit(name, tmp_path):
    family = BACKBONES[name]
    model, dense = family.build(), family.build()
    compressor = prune(model, batches(family), 0.6)
    changed = {target.name + ".weight" for target in compressor.targets}
    assert all(name.startswith("vision_model.") for name in changed)
    compressor.save_pretrained(tmp_path / "sparse", compressed=True)
    loaded = type(model).from_pretrained(tmp_path / "sparse").state_dict()
    for key, value in dense.state_dict().items():
        assert torch.equal(loaded[key], value) == (key not in changed)
    reasons = left_alone(model, compressor.targets)
    assert any(key.startswith("text_model.") for key in reasons)
    assert {reason for key, reason in reasons.items() if key.startswith("text_model.")} == {
        "outside the encoder, vision_model"
    }
