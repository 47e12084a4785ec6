"""What a prune loads: images for each purpose, and mistakes before any work."""

import dataclasses

import pytest
from support.asking import asked_for
from support.backbones import backbone_checkpoint
from support.models import build
from transformers import AutoImageProcessor

from cap_hf import CAPConfig
from cap_hf.commands.healing import HealArguments
from cap_hf.commands.preparing import Run, prepare
from cap_hf.commands.prune_arguments import PruneArguments
from cap_hf.commands.search_arguments import SearchArguments
from cap_hf.distributed.accelerator import make_accelerator
from cap_hf.errors import CAPError


def prepared(folder, **changes) -> Run:
    return prepare(asked_for(folder, **changes), make_accelerator())


def test_a_plain_run(tiny_checkpoint):
    run = prepared(tiny_checkpoint)
    assert (run.refits, run.recalibrates, run.healing, run.held_out) == (True, False, None, None)
    assert len(run.calibration) == len(run.loader.dataset) == 32
    assert run.evaluated == len(run.evaluation.dataset) == 50
    assert run.compressor.afterwards.prunes == 2
    assert run.compressor.afterwards.refits


def test_what_is_left_out(tiny_checkpoint):
    plain = PruneArguments(disable_tqdm=True, do_eval=False, num_recomputations=1)
    run = prepared(tiny_checkpoint, prune=plain, config=CAPConfig(num_grads=32, refit=False))
    assert (run.refits, run.evaluation, run.evaluated) == (False, None, 0)
    assert run.compressor.afterwards.prunes == 1


def test_a_search_has_images_that_nothing_else_has(tiny_checkpoint):
    search, heal = SearchArguments(max_accuracy_drop=0.1, max_search_samples=200), HealArguments(heal_steps=2)
    run = prepared(tiny_checkpoint, search=search, heal=heal, sparsities=[])
    held = {each.tobytes() for each in pixels(run.held_out.images.dataset)}
    assert run.held_out.num_read == 200
    assert len(run.healing.dataset) == 1347 - 200
    # Digits are alike at times, to the pixel, but not that often.
    for other in (run.calibration, run.healing.dataset):
        assert len(held & {each.tobytes() for each in pixels(other)}) < 3
    assert len(held & {each.tobytes() for each in pixels(run.held_out.images.dataset)}) > 190
    # The calibration examples are those of a plain run.
    plain = prepared(tiny_checkpoint)
    assert [each.tobytes() for each in pixels(plain.calibration)] == [
        each.tobytes() for each in pixels(run.calibration)
    ]


def pixels(dataset) -> list:
    return [dataset[index]["pixel_values"].numpy() for index in range(len(dataset))]


def test_a_bank_is_loaded_for_a_backbone(tmp_path):
    run = prepared(backbone_checkpoint(tmp_path / "backbone"))
    assert run.evaluated == 50 + 30


def test_batch_norm_is_estimated_anew_where_there_is_any(tiny_checkpoint, tmp_path):
    build("ResNet", num_channels=1).save_pretrained(tmp_path / "resnet")
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "resnet")
    arguments = PruneArguments(disable_tqdm=True, do_eval=False)
    assert prepared(tmp_path / "resnet", prune=arguments).recalibrates
    assert not prepared(
        tmp_path / "resnet", prune=dataclasses.replace(arguments, recalibrate_batch_norm=False)
    ).recalibrates
    with pytest.raises(CAPError, match="has no batch norm"):
        prepared(tiny_checkpoint, prune=dataclasses.replace(arguments, recalibrate_batch_norm=True))


def test_a_grid_without_a_sparsity_that_can_be_pruned_to_is_found_before_the_work(tiny_vit, tiny_checkpoint):
    from cap_hf import CAPCompressor

    CAPCompressor(tiny_vit, CAPConfig(method="magnitude"), disable_tqdm=True).prune(0.8)
    tiny_vit.save_pretrained(tiny_checkpoint)
    search = SearchArguments(max_accuracy_drop=0.1, sparsity_step=0.7)
    with pytest.raises(CAPError, match="sparse already: no multiple of 0.7 below 1 is more"):
        prepared(tiny_checkpoint, search=search, sparsities=[])
