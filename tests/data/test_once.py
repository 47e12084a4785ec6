"""A warning is said once, however often there is reason for it."""

import logging

from cap_hf.data.once import warn_once


def test_the_same_warning_is_said_once(caplog):
    logger = logging.getLogger("cap_hf.test")
    for message in ("one 100 %", "another", "one 100 %"):
        warn_once(logger, message)
    assert [record.getMessage() for record in caplog.records] == ["one 100 %", "another"]
