"""The wheel of the package: with compiled kernels where that can be done, and else of Python alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.libraries import make_compiler

from cap_hf.kernels.libraries import compile_all

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path):
    """A copy of what a wheel is made of."""
    folder = tmp_path / "tree"
    shutil.copytree(ROOT / "cap_hf", folder / "cap_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(tree, kind="wheel", **environment):
    """Call the backend as pip does, where its environment has PyTorch; return the file and what was printed."""
    script = f"import setuptools.build_meta as backend; print('made', backend.build_{kind}('dist'))"
    variables = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    variables.pop("CAP_HF_BUILD_KERNELS", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, env=variables | environment, capture_output=True, text=True
    )
    if done.returncode:
        return None, done.stdout + done.stderr
    return tree / "dist" / done.stdout.split("made ")[-1].strip(), done.stdout


def libraries_in(wheel):
    with zipfile.ZipFile(wheel) as file:
        return sorted(Path(name).name for name in file.namelist() if name.startswith("cap_hf/kernels/lib/"))


@pytest.mark.skipif(sys.platform != "linux", reason="wheels with kernels are for Linux")
def test_a_wheel_with_kernels_is_for_one_platform_and_every_python(tree, tmp_path):
    wheel, _ = build(tree, CXX=str(make_compiler(tmp_path)))
    assert wheel.name.split("-", 2)[2].startswith("py3-none-linux_")
    found = libraries_in(wheel)
    assert {"elimination.so", "sparse_linear.so", "sparse_int8_linear.so"} <= set(found)
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    # The sources come along, for where a library cannot be loaded; nothing of the build does.
    assert "cap_hf/kernels/csrc/elimination.cpp" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"cap_hf"}
    # A later build takes none of these, nor what is gone since.
    (tree / "cap_hf" / "memory.py").unlink()
    wheel, _ = build(tree, CAP_HF_BUILD_KERNELS="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries_in(wheel) == []
    with zipfile.ZipFile(wheel) as file:
        assert "cap_hf/memory.py" not in file.namelist()


@pytest.mark.skipif(sys.platform != "linux", reason="wheels with kernels are for Linux")
def test_what_the_wheel_holds_computes_as_what_is_compiled_here(tmp_path):
    """Compiled for every processor instead of this one, and loaded in a process of its own."""
    made = compile_all(tmp_path)
    assert not any(str(Path(torch.__file__).parent).encode() in library.read_bytes() for library in made)
    code = """
import sys, torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
from cap_hf.inference.int8_packing import pack_int8
from cap_hf.inference.packing import pack
from cap_hf.inference.operators import sparse_int8_linear, sparse_linear
from cap_hf.method.inverses import invert
weight = torch.randn(20, 32) * (torch.rand(20, 8) < 0.5).repeat_interleave(4, dim=1)
x = torch.randn(7, 32)
with torch.no_grad():
    torch.testing.assert_close(sparse_linear(x, pack(weight)), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert (sparse_int8_linear(x, pack_int8(weight)) - x @ weight.T).abs().max() < 0.3
    blocks = torch.randn(2, 40, 40, dtype=torch.float64)
    blocks = blocks @ blocks.mT + torch.eye(40)
    torch.testing.assert_close(invert(blocks.clone()) @ blocks, torch.eye(40).double().expand(2, 40, 40))
print("computed")
"""
    # One library for each extension: the plain one of the elimination.
    plain = [str(library) for library in made if library.name.count(".") == 1]
    assert len(plain) == 3
    done = subprocess.run([sys.executable, "-c", code, *plain], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout == "computed\n", done.stderr


def test_without_a_compiler_it_is_of_python_alone_and_a_line_says_so(tree):
    wheel, said = build(tree, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries_in(wheel) == []
    assert "no compiled kernels, they are compiled at the first use: there is no C++ compiler no-such-compiler" in said


def test_kernels_that_are_asked_for_and_cannot_be_compiled_are_an_error(tree):
    wheel, said = build(tree, CXX="no-such-compiler", CAP_HF_BUILD_KERNELS="1")
    assert wheel is None
    assert "The kernels cannot be compiled, as CAP_HF_BUILD_KERNELS asks: there is no C++ compiler" in said


def test_an_editable_install_compiles_nothing(tree, tmp_path):
    wheel, _ = build(tree, "editable", CXX=str(make_compiler(tmp_path)))
    assert "py3-none-any" in wheel.name
    assert not (tmp_path / "calls").exists()
    assert not (tree / "cap_hf" / "kernels" / "lib").exists()


def test_the_source_distribution_has_what_a_wheel_is_made_of(tree):
    archive, _ = build(tree, "sdist")
    names = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True).stdout
    for name in ("setup.py", "cap_hf/kernels/csrc/stable.h", "cap_hf/kernels/libraries.py"):
        assert f"/{name}\n" in names, name
