"""What libraries the C++ kernels make up, and how a wheel gets them compiled; setup.py imports this without PyTorch."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
# Where a wheel has its libraries. A source checkout has none: there they are compiled at the first use.
FOLDER = Path(__file__).parent / "lib"
# An operator of each extension.
OPERATORS = {
    "elimination": "eliminate",
    "sparse_linear": "sparse_linear",
    "sparse_int8_linear": "sparse_int8_linear",
}
FLAGS = ["-O3", "-fno-math-errno", "-fvisibility=hidden"]
# Flags of one extension. int8 results are the same to the bit on every processor: no product and sum are fused.
OWN_FLAGS = {"sparse_int8_linear": ["-ffp-contract=off"]}
# The oldest PyTorch whose stable ABI has all that the operators use; csrc/stable.h says the same to the compiler.
OLDEST_TORCH = "2.10"

# What /proc/cpuinfo calls the instructions of the x86-64 psABI's levels, beside those of the level before. `xsave` and
# `avx` are only there where the system saves the registers too.
V3 = frozenset(
    "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave".split()  # noqa: SIM905
)
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# The best first. The sparse products choose among instruction sets themselves; the elimination is compiled whole.
LEVELS = {"elimination": {"x86-64-v4": V4, "x86-64-v3": V3}}


class ObstacleError(RuntimeError):
    """Why no kernels can be compiled into a wheel here, in one line."""


def levels(name: str, machine: str) -> dict[str, frozenset[str]]:
    """Return the levels that an extension is compiled for beside the plain processor, and what each needs."""
    return LEVELS.get(name, {}) if machine == "x86_64" else {}


def file_name(name: str, level: str = "") -> str:
    """Return the name of an extension's library for a level, or for every processor of the platform."""
    return f"{name}.{level}.so" if level else f"{name}.so"


def compile_all(folder: Path) -> list[Path]:
    """Compile every library of a wheel into a folder, and return them. PyTorch's headers are read, it is not imported.

    Raises:
        ObstacleError: there is no compiler or no PyTorch here that can do it, or compiling failed.
    """
    torch, compiler = torch_folder(), find_compiler()
    made = []
    for name in OPERATORS:
        for level in ["", *levels(name, platform.machine())]:
            library = folder / file_name(name, level)
            command = [
                *compiler,
                *("-std=c++17", "-shared", "-fPIC", *FLAGS, *OWN_FLAGS.get(name, [])),
                *([f"-march={level}"] if level else []),
                # Headers that report where they are do not name this machine's folders.
                *(f"-I{torch / 'include'}", f"-fmacro-prefix-map={torch / 'include'}/="),
                str(SOURCES / f"{name}.cpp"),
                *("-o", str(library), f"-L{torch / 'lib'}", "-ltorch_cpu"),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ObstacleError(f"compiling {library.name} failed: {done.stderr[-2000:]}")
            made.append(library)
    return made


def torch_folder() -> Path:
    """Return PyTorch's folder.

    Raises:
        ObstacleError: it is not installed here, or too old.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ObstacleError("PyTorch is not in the environment that builds (pip: --no-build-isolation)")
    version = importlib.metadata.version("torch")
    if minor(version) < minor(OLDEST_TORCH):
        raise ObstacleError(f"PyTorch {OLDEST_TORCH} or newer is needed, and this is {version}")
    return Path(found.origin).parent


def minor(version: str) -> list[int]:
    """Return the first two numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: GCC, which alone compiles the code for all instruction sets.

    Raises:
        ObstacleError: there is none, or this is not Linux.
    """
    if sys.platform != "linux":
        raise ObstacleError(f"kernels are compiled into wheels for Linux, not for {sys.platform}")
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise ObstacleError(f"there is no C++ compiler {command[0]}")
    asked = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(asked, capture_output=True, text=True).stdout
    if "__GNUC__" not in macros or "__clang__" in macros:
        raise ObstacleError(f"{command[0]} is not GCC, which alone compiles the code for all instruction sets")
    return command
