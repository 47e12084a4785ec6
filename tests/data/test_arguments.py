"""Which data, as a command line names it."""

import subprocess
import sys

from cap_hf.data.arguments import DataArguments


def test_the_default_is_embedded():
    assert DataArguments().dataset_name == "digits"


def test_they_are_known_without_torch():
    code = "import sys, cap_hf.data.arguments; print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
