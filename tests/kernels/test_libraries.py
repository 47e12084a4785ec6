"""The libraries of a wheel: what is compiled and how, and one line where that cannot be done."""

import importlib.metadata
import importlib.util
import re

import pytest
from support.libraries import make_compiler

from cap_hf.kernels import libraries
from cap_hf.kernels.libraries import ObstacleError


def test_the_compiler_is_told_the_same_oldest_pytorch():
    text = (libraries.SOURCES / "stable.h").read_text()
    major, minor = re.search(r"TORCH_TARGET_VERSION \(\((\d+)ULL << 56\) \| \((\d+)ULL << 48\)\)", text).groups()
    assert f"{major}.{minor}" == libraries.OLDEST_TORCH


def test_every_extension_has_its_source():
    assert {path.stem for path in libraries.SOURCES.glob("*.cpp")} == set(libraries.OPERATORS)


def test_no_source_uses_what_differs_between_releases():
    """The stable ABI's headers alone: with any other a wheel would fit one release of PyTorch."""
    included = set()
    for path in libraries.SOURCES.iterdir():
        included |= set(re.findall(r"#include <((?:torch|ATen|c10)/[^>]*)>", path.read_text()))
    assert {path.rsplit("/", 1)[0] for path in included} == {"torch/csrc/stable"}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The file with the arguments of every call of the compiler."""
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path)))
    monkeypatch.setattr(libraries.platform, "machine", lambda: "x86_64")
    return tmp_path / "calls"


def test_the_elimination_is_compiled_for_every_level_and_nothing_for_this_machine_alone(calls, tmp_path):
    made = libraries.compile_all(tmp_path)
    assert [path.name for path in made] == [
        "elimination.so",
        "elimination.x86-64-v4.so",
        "elimination.x86-64-v3.so",
        "sparse_linear.so",
        "sparse_int8_linear.so",
    ]
    assert all(path.is_file() for path in made)
    lines = calls.read_text().splitlines()
    assert [re.findall(r"-march=(\S+)", line) for line in lines] == [[], ["x86-64-v4"], ["x86-64-v3"], [], []]
    assert ["-ffp-contract=off" in line for line in lines] == [False] * 4 + [True]
    assert not any("native" in line or "openmp" in line for line in lines)


def test_other_processors_have_one_library_each(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries.platform, "machine", lambda: "aarch64")
    assert [path.name for path in libraries.compile_all(tmp_path)] == [f"{name}.so" for name in libraries.OPERATORS]


def test_levels_build_on_each_other():
    assert libraries.V3 < libraries.V4


def test_a_mistake_in_the_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path, fails=True)))
    with pytest.raises(ObstacleError, match=r"compiling elimination.so failed: there is a mistake"):
        libraries.compile_all(tmp_path)


def test_clang_is_refused_as_it_leaves_instruction_sets_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path, macro="#define __GNUC__ 4 __clang__")))
    with pytest.raises(ObstacleError, match="compiler is not GCC"):
        libraries.compile_all(tmp_path)


def test_without_a_compiler_its_name_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ObstacleError, match="there is no C\\+\\+ compiler no-such-compiler"):
        libraries.compile_all(tmp_path)


def test_another_system_is_told(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries.sys, "platform", "darwin")
    with pytest.raises(ObstacleError, match="not for darwin"):
        libraries.compile_all(tmp_path)


def test_a_missing_pytorch_is_told(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ObstacleError, match="no-build-isolation"):
        libraries.compile_all(tmp_path)


def test_an_old_pytorch_is_told(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cpu")
    with pytest.raises(ObstacleError, match=r"PyTorch 2.10 or newer is needed, and this is 2.9.1\+cpu"):
        libraries.compile_all(tmp_path)
    assert not calls.exists()
