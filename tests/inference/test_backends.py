"""Every backend computes the model."""

import functools
from types import SimpleNamespace

import pytest
import torch
from support.inference import make_vit

from cap_hf import CAPError
from cap_hf.inference import backends as module
from cap_hf.inference.backends import BACKENDS, Subject
from cap_hf.inference.benchmark import benchmark
from cap_hf.inference.example import make_example


def test_every_backend_computes_the_same_model():
    names = [name for name in BACKENDS if "compile" not in name]
    before = torch.get_num_threads()
    found, missing = benchmark(make_vit(), names, [1, 3], [1, 2], runs=3)
    assert torch.get_num_threads() == before
    # On a processor without bfloat16, and where NNCF is not installed.
    assert set(missing) <= {"openvino_bf16", "openvino_int8"}, missing
    assert all(
        "instructions for bfloat16" in why or why.startswith("nncf is not installed") for why in missing.values()
    )
    measured = [name for name in names if name not in missing]
    assert [(each.threads, each.batch_size, each.backend) for each in found] == [
        (threads, size, name) for threads in (1, 2) for size in (1, 3) for name in measured
    ]
    for each in found:
        assert 0 < each.low_seconds <= each.seconds <= each.high_seconds
        assert each.images_per_second == pytest.approx(each.batch_size / each.seconds)
        rounded = each.backend.endswith(("bf16", "int8"))
        assert each.max_difference < (0.1 if rounded else 1e-4), each.backend
        # Of the sparse layers, those stay dense that are not faster.
        assert each.backend == "sparse_int8" or (each.max_difference > 1e-3) == rounded, each.backend
        assert each.same_top1 >= (0.75 if rounded else 1), each.backend
    sizes = {each.backend: each.weight_bytes for each in found}
    assert sizes["dense_bf16"] < 0.6 * sizes["dense"]
    assert sizes["sparse"] < sizes["dense"]
    for name in {"onnxruntime_int8", "openvino_int8"} & set(sizes):
        assert sizes[name] < 0.4 * sizes["onnxruntime"], name


def test_what_is_compiled_computes_the_same_model(monkeypatch):
    """Without the minutes of a code generator: what torch.compile sees of the model is whole either way."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    names = ["dense", "dense_compile", "sparse_compile", "sparse_int8_compile"]
    found, missing = benchmark(make_vit(), names, [1], [1], runs=3)
    assert not missing
    assert [each.backend for each in found] == names
    assert all(each.max_difference < (0.1 if "int8" in each.backend else 1e-4) for each in found)


def test_the_onnx_file_is_written_once_and_a_failure_is_not_repeated(monkeypatch):
    model = make_vit()
    subject = Subject(model, make_example(model, 2))
    written = []

    def write(runtime, model, example, path):
        written.append(path)
        path.touch()

    monkeypatch.setattr(module, "write_checked", write)
    assert subject.onnx() == subject.onnx() == written[0]
    assert len(written) == 1

    def fail(runtime, model, example, path):
        written.append(path)
        raise CAPError("no form")

    monkeypatch.setattr(module, "write_checked", fail)
    other = Subject(model, make_example(model, 2))
    for _ in range(2):
        with pytest.raises(CAPError, match="no form"):
            other.onnx()
    assert len(written) == 2


def test_bfloat16_without_instructions_for_it_is_one_line(monkeypatch):
    class Core:
        def get_property(self, device, name):
            return ["FP32", "INT8"]

    monkeypatch.setattr(module, "need", lambda package, extra: SimpleNamespace(Core=Core))
    model = make_vit()
    with pytest.raises(CAPError, match=r"^this processor has no instructions for bfloat16 \(AVX-512 BF16 or AMX\)$"):
        module.OpenVINOBFloat16(Subject(model, make_example(model, 2)))
