"""One line out of anybody's error."""

import errno

import pytest
import torch

from cap_hf.errors import LONGEST_REASON, CAPError, foreign_line, readable, reason


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
    found = reason(ValueError("beginning " + "word " * 1000 + "end"))
    assert len(found) <= LONGEST_REASON
    assert found.startswith("beginning word")
    assert found.endswith("word end")


IN_WORKER = """Caught OSError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 3, in __getitem__
    raise ValueError("first")
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 5, in __getitem__
    raise OSError("it is\n  gone") from error
OSError: it is
  gone
"""


def test_of_an_error_in_a_worker_the_reason_is_what_was_raised_there():
    assert reason(OSError(IN_WORKER)) == "it is gone"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "too little memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "use smaller batches"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "use smaller batches",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "a disk is full (/data/x)"),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "/data/x cannot be opened or written"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x cannot be opened or written"),
        (ImportError("no libGL"), "a package is missing or broken: no libGL"),
        (KeyError("pixel_values"), "KeyError: there is no 'pixel_values'"),
        (RuntimeError("shapes\ndiffer"), "RuntimeError: shapes differ"),
    ],
)
def test_the_error_of_another_library_is_one_line_with_what_to_do(error, words):
    line = foreign_line(error)
    assert words in line
    assert "\n" not in line


def test_it_is_a_value_error():
    assert issubclass(CAPError, ValueError)


def test_sizes_are_readable():
    sizes = [readable(each) for each in (2.5e9, 1e8, 2.3e7, 64 * 1024, 4096, 96, 0)]
    assert sizes == ["2.5 GB", "0.1 GB", "23.0 MB", "65.5 kB", "4.1 kB", "96 bytes", "0 bytes"]
