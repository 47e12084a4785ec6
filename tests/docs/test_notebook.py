"""The notebook runs from top to bottom, in a kernel of its own, and is kept without outputs."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.pages import ROOT

PATH = ROOT / "examples" / "prune_your_model.ipynb"
# Here it need not become good, only run.
QUICKER = {"epochs=8": "epochs=1", "--heal_steps 30": "--heal_steps 2", "--num_grads 128": "--num_grads 32"}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_its_links_lead_somewhere(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert [target for target in targets if not (PATH.parent / target).is_file()] == []


def test_it_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    source = nbformat.writes(notebook)
    assert all(source.count(long) == 1 for long in QUICKER)
    for long, short in QUICKER.items():
        source = source.replace(long, short)
    notebook = nbformat.reads(source, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    said = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    # A command that fails says so in a line of its own, which the notebook would go on after.
    assert not [text for text in said if "cap-hf prune: " in text or "cap-hf push: " in text]
    for folder in ("pruned/sparsity-0.75", "pruned/sparsity-0.9", "look"):
        assert (tmp_path / folder / "config.json").is_file(), said
    assert any("weights are 0" in text for text in said)
    card = (tmp_path / "look" / "README.md").read_text()
    assert "sparsity-90" in card
    assert any("## Accuracy" in text for text in said)
