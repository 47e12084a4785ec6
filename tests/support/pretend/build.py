"""Compiles the device once per machine and loads it; it is kept where cap_hf keeps its kernels."""

import hashlib
import platform
import tempfile
from pathlib import Path

import torch

from cap_hf.kernels import cache
from cap_hf.kernels.build import scripts_on_path

SOURCES = Path(__file__).parent / "csrc"


def load_library() -> None:
    """Load the compiled device of this version of its sources and of PyTorch, compiling it if need be."""
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    kept = cache.cache_folder() / f"pretend-{digest.hexdigest()[:16]}.so"
    content = cache.take(kept)
    with tempfile.TemporaryDirectory(prefix="pretend-") as folder:
        if content is None:
            cache.keep(kept, compile_and_load(Path(folder)).read_bytes())
        else:
            library = Path(folder) / kept.name
            library.write_bytes(content)
            torch.ops.load_library(library)


def compile_and_load(folder: Path) -> Path:
    """Compile the device in a folder and load it; return the library."""
    # Imported here: it is slow, and needed once a machine.
    from torch.utils import cpp_extension

    with scripts_on_path():
        cpp_extension.load(
            "pretend",
            [str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            extra_cflags=["-O1"],
            build_directory=str(folder),
            is_python_module=False,
        )
    return next(folder.glob(f"*{cpp_extension.LIB_EXT}"))
