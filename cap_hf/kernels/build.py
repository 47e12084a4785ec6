"""Load the C++ kernels: those of the wheel, or else what PyTorch's extension loader compiles once per machine."""

import functools
import hashlib
import logging
import os
import platform
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cap_hf.errors import reason
from cap_hf.kernels import cache, prebuilt
from cap_hf.kernels.libraries import FLAGS, OLDEST_TORCH, OPERATORS, OWN_FLAGS, SOURCES

logger = logging.getLogger(__name__)

# Set to anything but 0, it leaves the kernels out: the PyTorch code with the same results runs instead.
DISABLE_VARIABLE = "CAP_HF_DISABLE_EXTENSIONS"

# Threads that ask for the same extension at once get the same one.
LOADING = threading.Lock()


def are_disabled() -> bool:
    """Return whether the environment says that no kernel is to be used."""
    return os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0")


@functools.cache
def load_extension(name: str) -> bool:
    """Load the operators of `csrc/<name>.cpp` as `torch.ops.cap_hf.*`.

    A wheel brings them compiled. Elsewhere they are taken from the cache, or compiled if they are not in it.
    A library is compiled and loaded in a folder that is this process's own; the cache holds copies. So processes that
    start together do not meet, and one that is killed leaves nothing half written and no lock behind.

    Returns:
        Whether they are there. If not, one warning says why: there is no compiler, or it failed.
    """
    if are_disabled():
        return False
    with LOADING:
        return is_loaded(name) or load(name)


def has_kernels(tensor: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Return whether the elimination's kernels, which know float64 and `dtypes`, take a tensor; else PyTorch does."""
    known = tensor.dtype in (torch.float64, *dtypes)
    return tensor.device.type == "cpu" and known and load_extension("elimination")


def is_loaded(name: str) -> bool:
    """Return whether the operators of an extension are there already: registered twice they end the process."""
    return name in OPERATORS and hasattr(torch.ops.cap_hf, OPERATORS[name])


def load(name: str) -> bool:
    """Load an extension from the wheel or the cache, or compile it; return whether it is there, a warning if not."""
    try:
        check_torch()
        if prebuilt.load(name):
            return True
        kept = cache.cache_folder() / f"{name}-{fingerprint()}.so"
        content = cache.take(kept)
        with tempfile.TemporaryDirectory(prefix="cap_hf-") as folder:
            if content is None:
                cache.keep(kept, compile_extension(name, Path(folder)).read_bytes())
            else:
                library = Path(folder) / kept.name
                library.write_bytes(content)
                torch.ops.load_library(library)
    except Exception as error:  # whatever a compiler, a linker or a file system may do
        if name == "sparse_int8_linear":
            logger.warning("The C++ kernel %s cannot be used, and nothing takes its place: %s", name, reason(error))
        else:
            logger.warning("The C++ kernel %s cannot be used, slower PyTorch code is: %s", name, reason(error))
        return False
    return True


def check_torch() -> None:
    """Raise a RuntimeError if PyTorch is older than the stable ABI that the operators are written in."""
    if torch.__version__ < OLDEST_TORCH:
        raise RuntimeError(f"it needs PyTorch {OLDEST_TORCH} or newer, and this is {torch.__version__}")


def compile_extension(name: str, folder: Path) -> Path:
    """Compile and load `csrc/<name>.cpp` in a folder, and return the library.

    Raises:
        RuntimeError: the compiler or the linker failed, or there is none for these sources.
    """
    if sys.platform == "win32":
        raise RuntimeError("it needs GCC or Clang, and PyTorch compiles with MSVC on Windows")
    # Imported here: it is slow, and needed once per machine.
    from torch.utils import cpp_extension

    with scripts_on_path():
        cpp_extension.load(
            name,
            [str(SOURCES / f"{name}.cpp")],
            extra_cflags=compiler_flags() + OWN_FLAGS.get(name, []),
            build_directory=str(folder),
            is_python_module=False,
        )
    return next(folder.glob(f"{name}*{cpp_extension.LIB_EXT}"))


def compiler_flags() -> list[str]:
    """Return the compiler's flags; `native`, as a library is only used on processors like the one it is made on."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return [*FLAGS, native]


@functools.cache
def fingerprint() -> str:
    """Return 16 hexadecimal digits of the sources, the flags, PyTorch's version and the processor's instructions."""
    digest = hashlib.sha256(
        repr((torch.__version__, compiler_flags(), OWN_FLAGS, platform.machine(), prebuilt.processor())).encode()
    )
    for path in sorted(SOURCES.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def scripts_on_path() -> Iterator[None]:
    """Let the loader find the `ninja` of this environment, which need not be activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
