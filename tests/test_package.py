"""`import cap_hf`: light, and every public name is there when it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import PYTHON, clean_environment

import cap_hf


def run(script, home):
    done = subprocess.run([PYTHON, "-c", script], env=clean_environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_brings_nothing_from_elsewhere(tmp_path):
    script = "import sys; before = set(sys.modules); import cap_hf; print(*set(sys.modules) - before)"
    foreign = {name.split(".")[0] for name in run(script, tmp_path)} - {"cap_hf"}
    assert foreign <= set(sys.stdlib_module_names), foreign - set(sys.stdlib_module_names)


def test_public_names_come_when_they_are_used():
    assert set(cap_hf.__all__) == set(cap_hf._HOMES)
    assert set(cap_hf.__all__) <= set(dir(cap_hf))
    for name in cap_hf.__all__:
        assert getattr(cap_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="'cap_hf' has no attribute 'nope'"):
        _ = cap_hf.nope


def test_a_light_name_brings_nothing_heavy(tmp_path):
    script = "import sys, cap_hf; cap_hf.CAPConfig, cap_hf.CAPError, cap_hf.Resources; print('torch' in sys.modules)"
    assert run(script, tmp_path) == ["False"]


def test_editors_see_the_same_names():
    tree = ast.parse(Path(cap_hf.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    homes = {alias.name: node.module for node in checked.body for alias in node.names}
    assert homes == cap_hf._HOMES
    assert (Path(cap_hf.__file__).parent / "py.typed").is_file()
