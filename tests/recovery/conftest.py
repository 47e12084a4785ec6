"""Fixtures of the tests of recovery."""

import pytest


@pytest.fixture(autouse=True)
def bfloat16_ratio(monkeypatch):
    """Seconds in bfloat16 over seconds in float32, as a processor with bfloat16 instructions has them.

    The tests' models are tiny, so that they may run in bfloat16 anywhere.
    """
    monkeypatch.setattr("cap_hf.recovery.precision.bfloat16_ratio", lambda: 1.0)
