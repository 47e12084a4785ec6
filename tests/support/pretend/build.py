"""Compiles the device once per machine and loads it."""

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

import torch

from cap_hf.kernels.build import cache_folder, scripts_on_path

SOURCES = Path(__file__).parent / "csrc"


def load_library() -> None:
    """Load the compiled device of this version of its sources and of PyTorch, compiling it if need be."""
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    library = cache_folder() / f"pretend-{digest.hexdigest()[:16]}.so"
    if library.is_file():
        torch.ops.load_library(library)
    else:
        _compile_and_load(library)


def _compile_and_load(library: Path) -> None:
    # Imported here: it is slow, and needed once a machine.
    from torch.utils import cpp_extension

    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pretend-") as folder, scripts_on_path():
        cpp_extension.load(
            "pretend",
            [str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=["-O1"],
            build_directory=folder,
            is_python_module=False,
        )
        # Whole or not there, whoever else compiles at the same time.
        partial = library.with_name(f"{library.name}.{os.getpid()}")
        shutil.copyfile(next(Path(folder).glob(f"*{cpp_extension.LIB_EXT}")), partial)
        os.replace(partial, library)
