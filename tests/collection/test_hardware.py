"""GPUs by their names."""

import re

import pytest

from cap_hf.collection.hardware import GPUS, WORLDS, parse_hardware
from cap_hf.errors import CAPError


def test_a_gpu_is_found_by_its_name():
    assert parse_hardware("gpu=H100,count=8") == (GPUS["H100"], (8,))
    assert parse_hardware("gpu=rtx4090") == (GPUS["RTX4090"], WORLDS)
    gpu, counts = parse_hardware(" count=2 , gpu=A100, memory=40GB ")
    assert (gpu.name, gpu.memory, gpu.float32, counts) == ("A100", 40e9, GPUS["A100"].float32, (2,))
    assert gpu.describe() == "A100 (40.0 GB, 19.5 TFLOP/s in float32, 9.7 in float64, 2.04 TB/s)"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("H100", "plan_for='H100' is not such as gpu=H100,count=8"),
        ("", "plan_for='' is not such as"),
        ("count=8", "plan_for='count=8' is not such as"),
        ("gpu=H100,gpu=A100", "is not such as"),
        ("gpu=H100,gpus=8", "is not such as"),
        ("gpu=H100,count=", "is not such as"),
        ("gpu=H9000", "plan_for: gpu=H9000 is none of T4, V100, "),
        ("gpu=H100,count=0", "plan_for: count=0 is not a whole number"),
        ("gpu=H100,count=-1", "plan_for: count=-1 is not a whole number"),
        ("gpu=H100,count=²", "plan_for: count=² is not a whole number"),
        ("gpu=H100,count=5000", "from 1 to 4096"),
        ("gpu=H100,count=two", "plan_for: count=two is not a whole number"),
        ("gpu=H100,memory=much", "plan_for: memory=much is not a size such as 40GB"),
    ],
)
def test_what_names_no_gpu_is_refused_in_one_line(text, line):
    with pytest.raises(CAPError, match=re.escape(line)):
        parse_hardware(text)


def test_rates_are_those_of_gpus():
    """No slip in a unit: between a small card and the largest there is, and in the order of their precisions."""
    for gpu in GPUS.values():
        assert 16e9 <= gpu.memory <= 200e9
        assert 8e12 <= gpu.float32 <= gpu.bfloat16 <= 3e15
        assert 2e11 <= gpu.float64 < gpu.float32
        assert 3e11 <= gpu.bandwidth <= 1e13
