"""Compiles the C++ kernels through PyTorch's extension loader, once a machine, and keeps them in a cache."""

import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cap_hf.errors import reason

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# Set to anything but 0, it leaves the kernels out: the PyTorch code with the same results runs instead.
DISABLE_VARIABLE = "CAP_HF_DISABLE_EXTENSIONS"
# Where compiled kernels are kept; default: cap_hf in the user's cache folder.
CACHE_VARIABLE = "CAP_HF_CACHE"


@functools.cache
def load_extension(name: str) -> bool:
    """Make the operators of `csrc/<name>.cpp` available as `torch.ops.cap_hf.*`, compiling them if need be.

    A process compiles in a folder of its own and moves the whole library into the cache, so that processes which
    start together, or one that is killed, leave nothing half written and no lock behind.

    Returns:
        Whether they are there. If not, one warning says why: there is no compiler, or it failed.
    """
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return False
    try:
        library = cache_folder() / f"{name}-{fingerprint()}.so"
        if library.is_file():
            torch.ops.load_library(library)
        else:
            with tempfile.TemporaryDirectory(prefix="cap_hf-") as folder:
                keep(compile_extension(name, Path(folder)), library)
    except Exception as error:  # whatever a compiler, a linker or a file system may do
        logger.warning("The C++ kernel %s cannot be used, slower PyTorch code is: %s", name, reason(error))
        return False
    return True


def compile_extension(name: str, folder: Path) -> Path:
    """Compile and load `csrc/<name>.cpp` in a folder; returns the library."""
    # Imported here: it is slow, and needed once a machine.
    from torch.utils import cpp_extension

    with scripts_on_path():
        cpp_extension.load(
            name,
            [str(SOURCES / f"{name}.cpp")],
            extra_cflags=compiler_flags(),
            extra_ldflags=[flag for flag in compiler_flags() if "openmp" in flag],
            build_directory=str(folder),
            is_python_module=False,
        )
    return next(folder.glob(f"{name}*{cpp_extension.LIB_EXT}"))


def keep(built: Path, library: Path) -> None:
    """Copy a library into the cache in one step; a warning where that cannot be written."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_name(f"{library.name}.{os.getpid()}")
        shutil.copyfile(built, partial)
        os.replace(partial, library)
    except OSError as error:
        logger.warning(
            "Compiled kernels cannot be kept in %s (%s): they are compiled anew each time", library.parent, error
        )


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "cap_hf")


def compiler_flags() -> list[str]:
    """Flags of the compiler; `native` code, because a library is only used on processors like the one it is made on."""
    if sys.platform == "win32":
        return ["/O2", "/openmp"]
    # Torch's headers run loops in parallel only where OpenMP is on; Apple's compiler has none.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return ["-O3", native, "-fno-math-errno", *openmp]


@functools.cache
def fingerprint() -> str:
    """Changes with the sources, the flags, PyTorch, and the processor's instructions."""
    digest = hashlib.sha256(repr((torch.__version__, compiler_flags(), platform.machine(), processor())).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def processor() -> str:
    """What tells processors with other instructions apart: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


@contextmanager
def scripts_on_path() -> Iterator[None]:
    """Let the loader find the `ninja` of this environment, which need not be activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
