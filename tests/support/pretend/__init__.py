"""A pretend accelerator, so that what a GPU run does is checked where no GPU is.

The device "pretend" computes on the CPU, in memory that is the host's, but it is as strict as CUDA: it refuses
operators whose tensors are on several devices (numbers and indices apart), `.numpy()`, generators of the CPU, products
of integers, and operators that have no kernel for it, such as cap_hf's own for the CPU. Fresh memory holds NaN.
Its collectives (`collectives.py`) refuse what NCCL refuses.

A process has to call `load` before its first backward pass: PyTorch's autograd counts devices once.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate.state
import safetensors
import safetensors.torch
import torch
import transformers.training_args
from torch import distributed as dist

from support.pretend.build import load_library

NAME = "pretend"


def load() -> None:
    """Register the device and its collectives, and let accelerate, transformers and safetensors take them for a GPU."""
    load_library()
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.pretend.register_device()

    from support.pretend import collectives, device

    torch._register_device_module(NAME, device)
    torch.utils.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend(collectives.NAME, collectives.create, devices=[NAME])
    if "LOCAL_RANK" in os.environ:
        torch.pretend.set_device(int(os.environ["LOCAL_RANK"]))
    # Where a process has no other, accelerate takes the device of this variable; for the collectives of several it
    # knows a fixed list of devices.
    choose(NAME)
    accelerate.state.PartialState._prepare_backend = _prepare_backend
    # Safetensors' reader and transformers' `bf16` know fixed lists too.
    safetensors.torch.safe_open = SafeOpen
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def choose(device: str) -> None:
    """Let the accelerators that accelerate makes from now on be of the pretend device, or of the CPU."""
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if device == NAME:
        rank = os.environ.get("LOCAL_RANK")
        os.environ["ACCELERATE_TORCH_DEVICE"] = NAME if rank is None else f"{NAME}:{rank}"
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def _prepare_backend(
    self: accelerate.state.PartialState, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None
) -> tuple[str | None, accelerate.state.DistributedType]:
    """As accelerate's with CUDA: NCCL where a launcher has started this process; gloo, if asked for, on the CPU."""
    if "LOCAL_RANK" not in os.environ:
        return backend, accelerate.state.DistributedType.NO
    if cpu:
        return "gloo", accelerate.state.DistributedType.MULTI_CPU
    return backend or "pretend_nccl", accelerate.state.DistributedType.MULTI_GPU


class SafeOpen:
    """`safetensors.safe_open` that also gives tensors on the device."""

    def __init__(self, filename: Any, framework: str, device: Any = "cpu", **options: Any) -> None:
        self.device = torch.device(device)
        self.file = safetensors.safe_open(filename, framework, "cpu" if self.device.type == NAME else device, **options)

    def __enter__(self) -> "SafeOpen":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name).to(self.device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.file.get_tensors().items()}


class Launches:
    """What the device was asked for: `launches` of kernels and `transfers` that the host waits for, by operator."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()


@contextmanager
def count_launches() -> Iterator[Launches]:
    """Count what the device is asked to do inside; the counts are there when it ends."""
    counts = Launches()
    torch.ops.pretend.set_counting(True)
    try:
        yield counts
    finally:
        torch.ops.pretend.set_counting(False)
        counts.launches.update(torch.ops.pretend.launches())
        counts.transfers.update(torch.ops.pretend.transfers())


@contextmanager
def capacity(size: int, device: int = 0) -> Iterator[None]:
    """Inside, the device has `size` bytes beyond those that are in use; more is an OutOfMemoryError."""
    _, before = torch.pretend.mem_get_info(device)
    torch.ops.pretend.set_capacity(device, torch.pretend.memory_allocated(device) + size)
    try:
        yield
    finally:
        torch.ops.pretend.set_capacity(device, before)
