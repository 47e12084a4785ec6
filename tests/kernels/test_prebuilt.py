"""Kernels that came with the package: the best that the processor takes, and none that somebody else has put there."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
from support.libraries import make_library
from torch.torch_version import TorchVersion

from cap_hf.kernels import build, libraries, prebuilt

ANOTHER_USER = 12345


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """The folder of the package's libraries, with one in it, and the mark that its loading leaves."""
    folder = tmp_path / "lib"
    folder.mkdir(mode=0o755)
    (tmp_path / "made").mkdir()
    library = folder / "marking.so"
    library.write_bytes(make_library(tmp_path / "made", tmp_path / "brought").read_bytes())
    library.chmod(0o644)
    monkeypatch.setattr(libraries, "FOLDER", folder)
    monkeypatch.setenv("CAP_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAP_HF_DISABLE_EXTENSIONS", raising=False)
    build.load_extension.cache_clear()
    prebuilt.warn_once.cache_clear()
    yield library, tmp_path / "brought"
    build.load_extension.cache_clear()


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The mark of what is compiled in its place."""

    def compile_extension(name, folder):
        library = make_library(folder, tmp_path / "compiled")
        build.torch.ops.load_library(library)
        return library

    monkeypatch.setattr(build, "compile_extension", compile_extension)
    return tmp_path / "compiled"


def test_it_is_loaded_and_nothing_is_compiled_or_said(brought, compiled, tmp_path, caplog):
    _, mark = brought
    assert build.load_extension("marking")
    assert mark.exists()
    assert not compiled.exists()
    assert not (tmp_path / "cache").exists()
    assert caplog.messages == []


def test_it_comes_before_what_the_cache_holds(brought, compiled, tmp_path):
    library, mark = brought
    library.rename(tmp_path / "aside")
    assert build.load_extension("marking")
    assert compiled.exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    (tmp_path / "aside").rename(library)
    compiled.unlink()
    build.load_extension.cache_clear()
    assert build.load_extension("marking")
    assert mark.exists()
    assert not compiled.exists()


def test_switched_off_it_is_not_loaded(brought, monkeypatch):
    monkeypatch.setenv("CAP_HF_DISABLE_EXTENSIONS", "1")
    assert not build.load_extension("marking")
    assert not brought[1].exists()


def test_a_broken_one_is_one_warning_and_compiled(brought, compiled, caplog):
    library, mark = brought
    library.write_bytes(b"no library")
    for _ in range(2):
        build.load_extension.cache_clear()
        assert build.load_extension("marking")
    assert compiled.exists()
    assert not mark.exists()
    (message,) = caplog.messages
    assert "The C++ kernel marking that came with cap_hf cannot be loaded, it is compiled: " in message
    assert "marking.so" in message


@pytest.mark.parametrize("fault", ["foreign", "writable by the group", "writable by all"])
@pytest.mark.parametrize("place", ["library", "folder"])
def test_one_that_others_could_have_written_is_not_loaded(brought, compiled, fault, place, caplog):
    library, mark = brought
    path = library if place == "library" else library.parent
    if fault == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(path, ANOTHER_USER, -1)
    else:
        path.chmod(path.stat().st_mode | (0o020 if "group" in fault else 0o002))
    if "group" in fault and os.stat(prebuilt.__file__).st_mode & 0o020:
        pytest.skip("this checkout's own modules are writable by its group")
    assert build.load_extension("marking")
    assert not mark.exists()
    assert compiled.exists()
    (message,) = caplog.messages
    assert ("another user" if fault == "foreign" else "others may write") in message


def test_one_of_an_installers_store_is_loaded_through_its_link(brought, tmp_path):
    library, mark = brought
    store = tmp_path / "store"
    store.mkdir(mode=0o755)
    library.rename(store / "marking.so")
    library.symlink_to(store / "marking.so")
    assert prebuilt.load("marking")
    assert mark.exists()


def test_a_store_that_others_may_write_to_is_left_alone(brought, tmp_path, caplog):
    library, mark = brought
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o757)
    library.rename(store / "marking.so")
    library.symlink_to(store / "marking.so")
    assert not prebuilt.load("marking")
    assert not mark.exists()
    assert "others may write" in caplog.text


def test_an_older_pytorch_is_one_warning_that_names_the_version(brought, compiled, monkeypatch, caplog):
    monkeypatch.setattr(build.torch, "__version__", TorchVersion("2.9.1+cpu"))
    assert not build.load_extension("marking")
    assert not brought[1].exists()
    assert not compiled.exists()
    (message,) = caplog.messages
    assert "slower PyTorch code is: it needs PyTorch 2.10 or newer, and this is 2.9.1+cpu" in message


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0"])
def test_newer_ones_are_taken(version, monkeypatch):
    monkeypatch.setattr(build.torch, "__version__", TorchVersion(version))
    build.check_torch()


def test_the_best_level_of_the_processor_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "FOLDER", tmp_path)
    assert prebuilt.choose("elimination", set(libraries.V4), "x86_64") is None
    names = ["elimination.so", "elimination.x86-64-v3.so", "elimination.x86-64-v4.so"]
    for name in names:
        (tmp_path / name).touch()
    for instructions, name in zip([set(), libraries.V3, libraries.V4 | {"sha_ni"}], names, strict=True):
        assert prebuilt.choose("elimination", set(instructions), "x86_64").name == name
    assert prebuilt.choose("elimination", libraries.V4 - {"avx512dq"}, "x86_64").name == names[1]
    assert prebuilt.choose("elimination", set(libraries.V4), "aarch64").name == names[0]
    (tmp_path / names[2]).unlink()
    assert prebuilt.choose("elimination", set(libraries.V4), "x86_64").name == names[1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are of x86-64")
def test_this_processor_is_known():
    assert "sse2" in prebuilt.processor().split()


RESULTS = """
import sys, numpy, torch
torch.ops.load_library(sys.argv[1])
torch.manual_seed(0)
g = torch.randn(5, 200, 70, dtype=torch.float64)
fisher = g.mT @ g / 200 + 0.01 * torch.eye(70, dtype=torch.float64)
weights, keep = g[:, 0].contiguous(), g[:, 1] > 0.5
strips = [fisher[:, :40, :40].contiguous(), fisher[:, 40:].contiguous()]
found = {}
def add(name, result):
    for number, tensor in enumerate(result if isinstance(result, tuple) else (result,)):
        found[f"{name}.{number}"] = tensor.contiguous().numpy()
inverse, info = torch.ops.cap_hf.invert(fisher)
add("invert", (inverse, info))
for kind in (torch.float64, torch.float32):
    for group, limit, unit in ((0, 0, 1), (4, 2, 1), (0, 0, 2)):
        steps = 35 // unit
        result = torch.ops.cap_hf.eliminate(weights.to(kind), inverse.to(kind), steps, group, limit, unit)
        add(f"eliminate {kind} {group} {unit}", result)
for unit in (4, 8):
    result = torch.ops.cap_hf.eliminate(weights[:, :64], inverse[:, :64, :64].contiguous(), 64 // unit, 0, 0, unit)
    add(f"eliminate {unit}", result)
add("invert_quickly", torch.ops.cap_hf.invert_quickly(fisher, torch.ones(5, dtype=torch.float64))[0])
counts = torch.stack([keep.sum(1), keep.sum(1) // 2])
add("reconstruct", torch.ops.cap_hf.reconstruct(weights, fisher, (~keep).long().argsort(1), counts))
index = torch.arange(5)
nothing = (fisher.new_empty(0, 1, 1), fisher.new_empty(0), index.new_empty(5, 0))
add("assemble", torch.ops.cap_hf.assemble(strips, index, 3.0, 0.0, *nothing, 0.1))
numpy.savez(sys.argv[2], **found)
"""


def results_of(march, folder):
    """Compile the elimination for these processors, and return what it computes."""
    library, file, torch = folder / f"{march}.so", folder / f"{march}.npz", libraries.torch_folder()
    command = [*libraries.find_compiler(), "-std=c++17", "-shared", "-fPIC", *libraries.FLAGS, f"-march={march}"]
    command += [f"-I{torch / 'include'}", str(libraries.SOURCES / "elimination.cpp"), f"-L{torch / 'lib'}"]
    subprocess.run([*command, "-ltorch_cpu", "-o", str(library)], check=True)
    done = subprocess.run([sys.executable, "-c", RESULTS, str(library), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are of x86-64")
def test_every_level_prunes_as_what_is_compiled_for_this_processor_alone(tmp_path):
    """The best one to the bit; the others fuse other products with sums, and have narrower vectors."""
    instructions = set(prebuilt.processor().split())
    known = libraries.levels("elimination", "x86_64").items()
    levels = [*(level for level, needed in known if needed <= instructions), "x86-64"]
    expected = results_of("native", tmp_path)
    for level in levels:
        found = results_of(level, tmp_path)
        for name, result in found.items():
            if level == levels[0]:
                assert result.tobytes() == expected[name].tobytes(), (level, name)
            tolerance = 1e-4 if "float32" in name or "quickly" in name else 1e-9
            np.testing.assert_allclose(result, expected[name], tolerance, tolerance, err_msg=f"{level} {name}")
