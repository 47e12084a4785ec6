"""Which data, as a command line names it."""

import subprocess
import sys

import pytest

from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError


def test_the_default_is_embedded():
    assert DataArguments().dataset_name == "digits"


def test_they_are_known_without_torch():
    code = "import sys, cap_hf.data.arguments; print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_buffer_has_no_less_than_no_examples():
    with pytest.raises(CAPError, match="shuffle_buffer_size=-1 must be at least 0"):
        DataArguments(shuffle_buffer_size=-1)


def test_fewer_than_no_workers_are_refused():
    with pytest.raises(CAPError, match="dataloader_num_workers=-1 must be at least 0"):
        DataArguments(dataloader_num_workers=-1)


@pytest.mark.parametrize("white", [0, -1.0, float("nan"), float("inf")])
def test_white_is_above_black(white):
    with pytest.raises(CAPError, match=f"white_level={white} must be above 0"):
        DataArguments(white_level=white)
