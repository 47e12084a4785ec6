"""Patterns: how many removals a block has, and how many weights each of them takes."""

import pytest

from cap_hf.patterns import BLOCK_PATTERNS, BlockPattern, NMPattern, unit_of


@pytest.mark.parametrize(("pattern", "steps", "unit"), [(NMPattern(2, 4), 12, 1), (BlockPattern(4), 6, 4)])
def test_steps_and_units_of_24_weights(pattern, steps, unit):
    assert pattern.steps(24) == steps
    assert unit_of(pattern) == pattern.unit == unit


def test_names():
    assert list(BLOCK_PATTERNS) == ["1x2", "1x4", "1x8"]
    assert [str(NMPattern(2, 4)), str(BlockPattern(8))] == ["2:4", "1x8"]
    assert NMPattern(n=2, m=4) == NMPattern(2, 4) != NMPattern(4, 2)
    assert unit_of(None) == 1
