"""Programs of tests/kernels/csrc, compiled with the sanitizers of GCC and Clang."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_sanitized(source: str, sanitizers: str, folder: Path) -> str:
    """What a program prints, compiled in a folder; the test is skipped if the compiler has no such sanitizer."""
    program = folder / "main"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    sources = [f"-I{ROOT / 'cap_hf' / 'kernels' / 'csrc'}", str(ROOT / "tests" / "kernels" / "csrc" / source)]
    built = subprocess.run([*command, *sources, "-o", str(program)], capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no {sanitizers} sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
