"""Families of image models, each from a tiny config, through everything that is done with a checkpoint."""

import pytest
from support.families import CLASSIFIERS, batches
from support.lifecycle import (
    assert_gradient_samples,
    assert_runs_sparse,
    assert_survives_the_disk,
    assert_two_four,
    prune,
)

from cap_hf import CAPError, NMPattern, find_targets

families = pytest.mark.parametrize("name", CLASSIFIERS)


@families
def test_gradient_samples_are_those_of_single_examples(name):
    family = CLASSIFIERS[name]
    model = family.build()
    assert len(find_targets(model)) == family.targets
    assert_gradient_samples(model, batches(family, sizes=(3,))[0])


@families
def test_pruned_saved_compressed_and_run(name, tmp_path):
    family = CLASSIFIERS[name]
    data = batches(family)
    compressor = prune(family.build(), data, 0.6)
    assert_survives_the_disk(compressor, data[0], tmp_path)
    assert_runs_sparse(compressor.model, data[0])


@families
def test_two_of_four(name):
    family = CLASSIFIERS[name]
    if family.unpatterned:
        with pytest.raises(CAPError, match=r"2:4 does not divide the \d+ input channels of .*--exclude"):
            find_targets(family.build(), pattern=NMPattern(2, 4))
    assert_two_four(family.build(), batches(family), family.unpatterned)
