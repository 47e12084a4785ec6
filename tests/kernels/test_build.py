"""Compiling the kernels: once per machine, and where that fails one warning and slower code with the same results."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from cap_hf.method import elimination
g = torch.randn(3, 60, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
fisher = g.mT @ g
print(elimination.has_kernels(fisher), elimination.eliminate(g[:, 0], elimination.invert(fisher)).order.sum().item())
"""


def run(**environment):
    root = Path(__file__).parents[2]
    variables = os.environ | {"PYTHONPATH": str(root)} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0], done.stdout.split()[1], done.stderr


def test_switched_off_nothing_is_compiled_and_nothing_said(tmp_path):
    used, _, errors = run(CAP_HF_DISABLE_EXTENSIONS="1", CAP_HF_CACHE=str(tmp_path))
    assert used == "False"
    assert not list(tmp_path.iterdir())
    assert "kernel" not in errors


def test_a_compiler_that_fails_is_one_warning(tmp_path):
    used, total, errors = run(CXX="false", CAP_HF_CACHE=str(tmp_path))
    assert used == "False"
    assert errors.count("The C++ kernel elimination cannot be used") == 1
    assert total == run(CAP_HF_DISABLE_EXTENSIONS="1")[1]


def test_a_compiled_kernel_is_used_again(tmp_path):
    assert run(CAP_HF_CACHE=str(tmp_path))[0] == "True"
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    assert run(CAP_HF_CACHE=str(tmp_path), CXX="false")[0] == "True"
    assert library.stat().st_mtime_ns == made


ASKED_AGAIN = """
import threading
from cap_hf.kernels import build
found = []
threads = [threading.Thread(target=lambda: found.append(build.load_extension("elimination"))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
build.load_extension.cache_clear()
print([*found, build.load_extension("elimination")])
"""


def test_an_extension_is_loaded_once_per_process_whoever_asks():
    """Operators that are registered a second time end the process."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ASKED_AGAIN], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == str([True] * 5), done.stderr
