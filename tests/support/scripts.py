"""Scripts as modules: they import each other from their own folder, as they do when they are run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(path: str) -> ModuleType:
    """Return a script of `scripts/` as a module, such as `benchmarks/compare.py`; its `main` is not run."""
    file = SCRIPTS / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def run_script(path: str, *arguments: object, monkeypatch: object, **constants: object) -> ModuleType:
    """Run a script's `main` with these arguments, in this process, and return it.

    Args:
        constants: of the script, other than they are there: a benchmark's models made small.
    """
    module = load_script(path)
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    module.main()
    return module
