"""Runtimes of others as guests: nothing is sent to their makers, and the process stays as it was."""

import contextlib
import ctypes
import io
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from cap_hf.extras import need


def need_onnxruntime() -> ModuleType:
    """Import ONNX Runtime without its telemetry, which its builds send unless told not to before they are imported.

    Raises:
        CAPError: it is not installed, or cannot be imported.
    """
    with environment("ORT_DISABLE_TELEMETRY", "1"):
        return need("onnxruntime", "export")


def need_nncf() -> ModuleType:
    """Import NNCF without its telemetry; it also makes all later loggers of the process of its own class.

    Raises:
        CAPError: it is not installed, or cannot be imported.
    """
    kind = logging.getLoggerClass()
    try:
        with environment("NNCF_CI", "1"), contextlib.redirect_stdout(io.StringIO()):
            return need("nncf", "benchmark")
    finally:
        logging.setLoggerClass(kind)


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux: the memory that a thread handles signals on."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> SignalStack:
    """Return this thread's signal stack, on Linux."""
    found = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Leave this thread the signal stack that it has.

    OpenVINO 2026.4 puts one of its own in its place when it compiles a model, and gives that memory back some time
    later. The next signal that Python handles then ends the process: that of a child that has ended, as soon as a
    DataLoader has had workers.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal_stack()
    try:
        yield
    finally:
        ctypes.CDLL(None).sigaltstack(ctypes.byref(before), None)
