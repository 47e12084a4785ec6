"""Runtimes of others: what their import sends and leaves, and the signal stack that OpenVINO would take."""

import logging
import os
import subprocess
import sys

import pytest
from support.inference import make_vit

from cap_hf import CAPError
from cap_hf.inference.benchmark import benchmark
from cap_hf.inference.runtimes import need_nncf, need_onnxruntime, signal_stack


def test_nncf_is_imported_without_a_trace(monkeypatch):
    pytest.importorskip("nncf", reason="NNCF is not installed: pip install 'cap_hf[benchmark]'")
    for before in (None, "0"):
        monkeypatch.delenv("NNCF_CI", raising=False)
        if before is not None:
            monkeypatch.setenv("NNCF_CI", before)
        kind = logging.getLoggerClass()
        assert need_nncf().__name__ == "nncf"
        assert logging.getLoggerClass() is kind
        assert os.environ.get("NNCF_CI") == before


def test_nncf_is_told_not_to_send_anything(monkeypatch):
    class Loud(logging.Logger):
        pass

    def imported(package, extra):
        assert (package, extra) == ("nncf", "benchmark")
        assert os.environ["NNCF_CI"] == "1"
        logging.setLoggerClass(Loud)
        raise CAPError("not there")

    monkeypatch.delenv("NNCF_CI", raising=False)
    monkeypatch.setattr("cap_hf.inference.runtimes.need", imported)
    with pytest.raises(CAPError, match="not there"):
        need_nncf()
    assert logging.getLoggerClass() is not Loud
    assert "NNCF_CI" not in os.environ


def test_onnx_runtime_starts_no_thread_that_sends(monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    code = """
import os, numpy
from cap_hf.inference.runtimes import need_onnxruntime
before = len(os.listdir("/proc/self/task"))
need_onnxruntime()
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "0\n", done.stderr
    assert need_onnxruntime().__name__ == "onnxruntime"
    assert "ORT_DISABLE_TELEMETRY" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are looked after on Linux")
def test_openvino_leaves_the_signal_stack():
    before = signal_stack()
    found, missing = benchmark(make_vit(), ["openvino"], [1, 2], [1], runs=3)
    assert not missing
    assert len(found) == 4
    assert (signal_stack().address, signal_stack().size) == (before.address, before.size)


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are looked after on Linux")
def test_signals_are_handled_after_several_models():
    # Without `kept_signal_stack` this process ends with a segmentation fault: the third model leaves the stack of the
    # second, which is gone. A DataLoader with workers has signals handled as this code does.
    code = """
import faulthandler, gc, signal, subprocess
faulthandler.enable()
import numpy, openvino
from openvino import opset13
from cap_hf.inference.runtimes import kept_signal_stack
kept = []
for _ in range(3):
    x = opset13.parameter([1, 8])
    network = openvino.Model([opset13.matmul(x, opset13.constant(numpy.ones((8, 8), "f")), False, False)], [x])
    core = openvino.Core()
    with kept_signal_stack():
        model = core.compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": 1})
    model([numpy.ones((1, 8), "f")])
    kept.append((core, model))
    del core, model
while kept:
    kept.pop(0)
    gc.collect()
ended = []
signal.signal(signal.SIGCHLD, lambda *_: ended.append(1))
subprocess.run(["true"])
print(len(ended))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
