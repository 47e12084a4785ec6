"""Nothing in cap_hf unpickles: checkpoints are safetensors and JSON."""

import ast
from pathlib import Path

import pytest

import cap_hf

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PACKAGE = Path(cap_hf.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").rglob("*.py")])


def violations(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        else:
            names = set()
        if names & FORBIDDEN_MODULES:
            yield f"line {node.lineno} imports {names & FORBIDDEN_MODULES}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
            owner = getattr(node.func.value, "id", None)
            if owner == "torch" and node.func.attr == "load" and keywords.get("weights_only") is not True:
                yield f"line {node.lineno} calls torch.load without weights_only=True"
            if keywords.get("allow_pickle") or keywords.get("weights_only") is False:
                yield f"line {node.lineno} allows pickles"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE.parent)) for path in FILES])
def test_no_unpickling(path):
    assert list(violations(path.read_text())) == []


def test_the_search_finds_what_it_looks_for():
    for source in (
        "import pickle",
        "from joblib import load",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
    ):
        assert list(violations(source))
    assert not list(violations("torch.load(x, weights_only=True)"))
