"""What a collection may use."""

import pytest

from cap_hf.collection.resources import Resources
from cap_hf.errors import CAPError


@pytest.mark.parametrize(
    ("text", "expected"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("4096", 4096)]
)
def test_memory_sizes(text, expected):
    assert Resources(max_memory=text).bytes == expected


@pytest.mark.parametrize("text", ["8 apples", "-1GB", "0GB", "GB"])
def test_memory_sizes_that_are_none(text):
    with pytest.raises(CAPError, match="is not a size such as 8GB"):
        Resources(max_memory=text)
