"""Augmentation presets: what comes out is images and label distributions, and weaker presets change less."""

import itertools
import sys

import pytest
import torch
from support.recovery import NUM_LABELS, collate, examples, image_processor, make_trainer, sparse_vit

from cap_hf.errors import CAPError
from cap_hf.recovery.augmentation import (
    PRESETS,
    AugmentationPreset,
    BatchAugmentation,
    RandomFlip,
    make_augmentation,
    pixel_statistics,
)


def batch(channels=3, size=16, count=24):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, channels, size, size, generator=generator) * 2 - 1
    return pixels, torch.arange(count) % NUM_LABELS


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["light", "medium", "heavy"])
def test_images_stay_images_and_labels_stay_distributions(name, channels):
    torch.manual_seed(0)
    augmentation = make_augmentation(name, image_processor(), NUM_LABELS)
    pixels, labels = batch(channels)
    for _ in range(12):
        images, targets = augmentation(pixels, labels)
        assert images.shape == pixels.shape
        assert images.dtype == pixels.dtype
        assert images.isfinite().all()
        assert images.min() >= -1 - 1e-5
        assert images.max() <= 1 + 1e-5
        assert targets.shape == (len(labels), NUM_LABELS)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(labels)))
        assert (targets >= 0).all()


def test_nothing_is_nothing():
    assert make_augmentation("none", None, NUM_LABELS) is None


@pytest.mark.parametrize("name", ["none", "flip"])
def test_a_run_without_augmentation_but_flips_does_not_import_kornia(tmp_path, name):
    before = set(sys.modules)
    make_trainer(tmp_path, sparse_vit(), max_steps=1, augmentation=name).train()
    assert not any(name.startswith("kornia") for name in set(sys.modules) - before)


def test_it_works_without_torchvision():
    make_augmentation("heavy", image_processor(), NUM_LABELS)(*batch())
    assert "torchvision" not in sys.modules


def test_presets_grow_stronger():
    names = ["none", "light", "medium", "heavy"]
    assert [name for name in PRESETS if name != "flip"] == names
    for weaker, stronger in itertools.pairwise(names):
        one, other = PRESETS[weaker], PRESETS[stronger]
        assert one.min_crop > other.min_crop
        assert one.magnitude < other.magnitude
        for part in ("operations", "mixup", "cutmix", "erasing", "label_smoothing"):
            assert getattr(one, part) <= getattr(other, part)


def test_without_flip_a_preset_never_mirrors():
    assert make_augmentation("light", image_processor(), NUM_LABELS, flip=False).flip is None
    assert make_augmentation("light", image_processor(), NUM_LABELS).flip is not None


def test_flips_without_kornia_are_made_of_a_preset_of_nothing_else():
    augmentation = make_augmentation("flip", None, NUM_LABELS)
    assert isinstance(augmentation, RandomFlip)
    assert make_augmentation("flip", None, NUM_LABELS, flip=False) is None
    pixels, labels = batch(count=64)
    assert augmentation(pixels, labels)[1] is labels


@pytest.mark.parametrize(
    "augmentation",
    [RandomFlip(0.5), BatchAugmentation(AugmentationPreset(flip=0.5), image_processor(), NUM_LABELS)],
)
def test_flip_alone_mirrors_half_of_the_images(augmentation):
    torch.manual_seed(0)
    pixels, labels = batch(count=64)
    images, _ = augmentation(pixels, labels)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(images, pixels, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(images, pixels, strict=True)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48


@pytest.mark.parametrize("part", ["mixup", "cutmix"])
def test_mixed_labels_are_the_shares_of_mixed_images(part):
    torch.manual_seed(0)
    augmentation = BatchAugmentation(AugmentationPreset(**{part: 1.0}), image_processor(), NUM_LABELS)
    # Every image is its label, so that the mean of what comes out says what was mixed.
    _, labels = batch()
    levels = torch.tensor([-1.0, -0.5, 0.25, 1.0])
    images, targets = augmentation(levels[labels][:, None, None, None].expand(-1, 3, 16, 16).clone(), labels)
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), targets @ levels, atol=1e-4, rtol=1e-4)
    assert (targets.amax(dim=1) < 1).any()


def test_the_same_seed_is_the_same_batch():
    augmentation = make_augmentation("heavy", image_processor(), NUM_LABELS)
    outcomes = []
    for _ in range(2):
        torch.manual_seed(3)
        outcomes.append(augmentation(*batch()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_pixels_are_taken_back_to_images():
    class Processor:
        do_normalize, do_rescale = True, True
        image_mean, image_std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)

    assert pixel_statistics(Processor()) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    Processor.do_normalize = False
    assert pixel_statistics(Processor()) == ([0.0], [1.0])
    Processor.do_rescale = False
    mean, std = pixel_statistics(Processor())
    # pixels in [0, 255] times 1/255 are images.
    assert (mean, std) == ([0.0], [pytest.approx(1 / 255)])


def test_evaluation_is_not_augmented(tmp_path):
    model = sparse_vit()
    trainer = make_trainer(tmp_path, model, augmentation="heavy")
    batch = collate(examples(16))
    with torch.no_grad():
        expected = float(model.eval()(**batch).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_is_missing_is_one_line():
    with pytest.raises(CAPError, match="none, flip, light, medium, heavy"):
        make_augmentation("strong", image_processor(), NUM_LABELS)
    with pytest.raises(CAPError, match="processing_class"):
        make_augmentation("light", None, NUM_LABELS)


@pytest.mark.parametrize("part", ["flip", "mixup", "cutmix"])
def test_an_example_without_a_label_brings_none_into_a_mixture(part):
    """Two labels of every four: of a mixture with the others a share is left."""
    torch.manual_seed(0)
    augmentation = BatchAugmentation(AugmentationPreset(**{part: 1.0}), image_processor(), NUM_LABELS)
    pixels, labels = batch()
    labels = torch.where(labels < 2, labels, -100)
    _, targets = augmentation(pixels, labels)
    assert not targets[:, 2:].any()
    assert (targets.sum(dim=1) <= 1 + 1e-6).all()
    assert targets.sum() == pytest.approx(12, rel=1e-4 if part == "flip" else 0.5)
