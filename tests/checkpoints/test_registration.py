"""`import cap_hf` makes from_pretrained load compressed checkpoints, whichever of the two is imported first."""

import subprocess
import sys

import pytest
import transformers.modeling_utils
from support.checkpoints import PYTHON, clean_environment, make_checkpoint

from cap_hf.checkpoints.registration import AWAITED, Registration, register


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "compressed"
    model = make_checkpoint(folder, compressed=True)
    return folder, model.num_parameters()


@pytest.mark.parametrize(
    "imports",
    [
        "import cap_hf; from transformers import AutoModelForImageClassification",
        "from transformers import AutoModelForImageClassification, PreTrainedModel; import cap_hf",
        # The plug-in imports transformers, which imports the plug-in.
        "import cap_hf.checkpoints.quantizer; from transformers import AutoModelForImageClassification",
    ],
)
def test_either_order_of_the_imports(compressed, tmp_path, imports):
    folder, parameters = compressed
    script = f"""
{imports}
model = AutoModelForImageClassification.from_pretrained({str(folder)!r})
assert model.num_parameters() == {parameters}
import sys, transformers.modeling_utils as module
from importlib.machinery import SourceFileLoader
assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
"""
    environment = clean_environment(tmp_path, HF_HUB_OFFLINE="1")
    done = subprocess.run([PYTHON, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_registering_twice_leaves_one_finder(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, Registration)])
    monkeypatch.delitem(sys.modules, AWAITED)
    register()
    register()
    assert sum(isinstance(finder, Registration) for finder in sys.meta_path) == 1


def test_a_module_is_found_as_without_it(monkeypatch):
    monkeypatch.delitem(sys.modules, AWAITED)
    spec = Registration().find_spec(AWAITED, transformers.__path__)
    assert spec.origin == transformers.modeling_utils.__file__
    assert Registration().find_spec("transformers.trainer", transformers.__path__) is None
