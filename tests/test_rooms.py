"""The house stands: imports go downwards, files are short, modules have tests, and public names have docstrings.

docs/architecture.md tells of what is checked here.
"""

import ast
import re
from pathlib import Path

import pytest
from support.pages import ROOT, rooms

import cap_hf

MODULES = rooms.modules()
# method/ is the paper: what these modules do is the work of other rooms.
FOREIGN_TO_METHOD = re.compile(
    r"(cap_hf\.(distributed|collection)|torch\.distributed|accelerate|safetensors|tqdm|transformers"
    r"|json|os|pathlib|shutil|tempfile)(\.|$)"
)
MAX_LINES = 300
# Modules without a test file of their own, and why.
UNTESTED: dict[str, str] = {}


def floor(room: str) -> int:
    """The number of a room's floor, from the top; the package itself, which gives out all names, is the roof."""
    return next((number for number, beside in enumerate(rooms.FLOORS) if room in beside), -1)


def test_every_module_is_in_a_room():
    assert {rooms.room_of(module) for module in MODULES} <= set(rooms.ROOMS)


def test_the_page_tells_the_floors():
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert told == [
        (str(number), ", ".join(f"`{room}`" for room in beside)) for number, beside in enumerate(rooms.FLOORS, 1)
    ]


def test_imports_go_downwards():
    upwards = {
        f"{start} -> {to}": importers for (start, to), importers in rooms.edges().items() if floor(to) <= floor(start)
    }
    assert upwards == {}


def test_imports_are_seen_wherever_they_stand(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import cap_hf.masks as m\ndef f():\n    from cap_hf.hub import card\n    import cap_hf.data.images\n"
    )
    found = {rooms.room_of(name) for name in rooms.imports(file)}
    assert found == {"masks", "hub", "data"}
    file.write_text("from cap_hf import CAPError\n")
    assert {rooms.room_of(name) for name in rooms.imports(file)} == {"cap_hf"}
    file.write_text("from . import card\n")
    with pytest.raises(ValueError, match="name the whole module"):
        rooms.imports(file)


def test_the_picture_is_true():
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert rooms.render() in page, "the table of imports is out of date: run `.venv/bin/python scripts/docs.py`"


def test_the_method_knows_no_process_no_disk_and_no_bar():
    found = {
        module: [name for name in rooms.imports(path) if FOREIGN_TO_METHOD.match(name)]
        for module, path in MODULES.items()
        if rooms.room_of(module) == "method"
    }
    assert {module: names for module, names in found.items() if names} == {}


def test_files_are_short():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > MAX_LINES} == {}


def place_of_tests(path: Path) -> Path:
    """Where the tests of a module are."""
    relative = path.relative_to(ROOT / "cap_hf")
    return ROOT / "tests" / relative.with_name(f"test_{relative.name}")


def test_every_module_has_a_test_file():
    without = [module for module, path in MODULES.items() if not place_of_tests(path).is_file()]
    assert without == sorted(UNTESTED)


def test_public_functions_and_classes_have_docstrings():
    assert [
        f"{module}.{node.name}"
        for module, path in MODULES.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ] == []


def test_members_of_public_classes_have_docstrings():
    assert [
        f"{name}.{member}"
        for name in cap_hf.__all__
        for member, value in vars(getattr(cap_hf, name)).items()
        if not member.startswith("_")
        and (callable(value) or isinstance(value, property | classmethod | staticmethod))
        and not value.__doc__
    ] == []
