"""One line out of anybody's error."""

import pytest

from cap_hf.errors import LONGEST_REASON, CAPError, reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\n  two\n\nthree  "), "one two three"),
        (RuntimeError(), "RuntimeError"),
        (OSError(""), "OSError"),
        (CAPError("as it is"), "as it is"),
    ],
)
def test_a_reason_is_one_line_that_says_something(error, expected):
    assert reason(error) == expected


def test_a_long_reason_is_shortened():
    found = reason(ValueError("word " * 1000))
    assert len(found) <= LONGEST_REASON
    assert found.endswith(" ...")


def test_it_is_a_value_error():
    assert issubclass(CAPError, ValueError)
