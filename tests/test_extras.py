"""What an extra installs is asked for in one line where it is missing."""

import importlib.util

import pytest
from support.inference import make_vit
from support.recovery import image_processor

from cap_hf import CAPError, export_onnx, quantize_int8
from cap_hf.data.splits import load_digits
from cap_hf.extras import need
from cap_hf.hub.picture import draw_sparsity
from cap_hf.inference.plot import draw_benchmark
from cap_hf.inference.runtimes import need_nncf
from cap_hf.recovery.augmentation import make_augmentation


@pytest.fixture
def without(monkeypatch):
    """Hide a package."""
    find = importlib.util.find_spec

    def hide(package):
        def find_others(name, *rest):
            return None if name == package else find(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find_others)

    return hide


def test_what_is_there_is_imported():
    assert need("json", "demo").loads("1") == 1
    assert need("os.path", "demo").sep == "/"
    with pytest.raises(CAPError, match=r"^nowhere is not installed: pip install 'cap_hf\[plots\]'$"):
        need("nowhere.below", "plots")


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("sklearn", "demo", load_digits),
        ("kornia", "recovery", lambda: make_augmentation("light", image_processor(), 10)),
        ("matplotlib", "plots", lambda: draw_sparsity(["a"], [0.5], 0.5, "nowhere.png")),
        ("matplotlib", "plots", lambda: draw_benchmark([], "", "nowhere.png")),
        ("onnxruntime", "export", lambda: export_onnx(make_vit(), "nowhere")),
        ("onnxscript", "export", lambda: export_onnx(make_vit(), "nowhere")),
        ("nncf", "benchmark", need_nncf),
        ("torchao", "quantization", lambda: quantize_int8(make_vit())),
    ],
)
def test_a_missing_package_names_its_extra(without, package, extra, call):
    without(package)
    with pytest.raises(CAPError, match=rf"^{package} is not installed: pip install 'cap_hf\[{extra}\]'$"):
        call()
