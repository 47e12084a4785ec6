"""A warning is said once, however often there is reason for it; other libraries' are left out for a while."""

import logging

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from cap_hf.notices import only_errors, warn_once


def test_the_same_warning_is_said_once(caplog):
    logger = logging.getLogger("cap_hf.test")
    for message in ("one 100 %", "another", "one 100 %"):
        warn_once(logger, message)
    assert [record.getMessage() for record in caplog.records] == ["one 100 %", "another"]


@pytest.mark.parametrize("library", [transformers_logging, datasets.utils.logging])
def test_libraries_are_as_they_were_afterwards(library):
    before = library.get_verbosity()
    try:
        library.set_verbosity_info()
        with pytest.raises(KeyError), only_errors():
            assert library.get_verbosity() == logging.ERROR
            raise KeyError
        assert library.get_verbosity() == logging.INFO
    finally:
        library.set_verbosity(before)


@pytest.mark.parametrize("enabled", [True, False])
def test_bars_are_as_they_were_afterwards(enabled):
    before = transformers_logging.is_progress_bar_enabled()
    try:
        (transformers_logging.enable_progress_bar if enabled else transformers_logging.disable_progress_bar)()
        with only_errors():
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.is_progress_bar_enabled() == enabled
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()
