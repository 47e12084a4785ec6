"""Small libraries that stand in for kernels, and compilers that stand in for GCC."""

import os
import subprocess
from pathlib import Path

# A library whose loading leaves a mark, and no more: a kernel takes seconds to compile.
SOURCE = '#include <cstdio>\n__attribute__((constructor)) static void mark() { std::fclose(std::fopen(MARK, "w")); }\n'
# Says what GCC says of itself, notes its arguments one a line, and makes an empty file of the library.
COMPILER = """#!/usr/bin/env python3
import sys
if "-dM" in sys.argv:
    print("{macro}")
    sys.exit()
with open("{calls}", "a") as file:
    print(*sys.argv[1:], file=file)
if {fails}:
    sys.exit("there is a mistake")
open(sys.argv[sys.argv.index("-o") + 1], "w").close()
"""


def make_library(folder: Path, mark: Path) -> Path:
    """Compile a library that writes the file `mark` when it is loaded."""
    source, library = folder / "marking.cpp", folder / "marking.so"
    source.write_text(SOURCE)
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-shared", "-fPIC", f'-DMARK="{mark}"', str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def make_compiler(folder: Path, macro: str = "#define __GNUC__ 12", fails: bool = False) -> Path:
    """Write a program that CXX can name; its calls are in the file `calls` of the folder."""
    compiler = folder / "compiler"
    compiler.write_text(COMPILER.format(macro=macro, calls=folder / "calls", fails=fails))
    compiler.chmod(0o755)
    return compiler
