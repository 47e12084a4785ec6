"""The module `torch.pretend`, which PyTorch asks as it asks `torch.cuda`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICE_COUNT = 2

_ops = torch.ops.pretend
Device = torch.device | str | int | None


def _index(device: Device) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return DEVICE_COUNT


def current_device() -> int:
    return _ops.get_device()


def set_device(device: Device) -> None:
    _ops.set_device(_index(device))


@contextmanager
def device(device: Device) -> Iterator[None]:
    before = current_device()
    set_device(device)
    try:
        yield
    finally:
        set_device(before)


def synchronize(device: Device = None) -> None:
    torch.accelerator.synchronize(_index(device))


def empty_cache() -> None:
    torch.accelerator.empty_cache()


def mem_get_info(device: Device = None) -> tuple[int, int]:
    return torch.accelerator.get_memory_info(_index(device))


def memory_allocated(device: Device = None) -> int:
    return torch.accelerator.memory_allocated(_index(device))


def memory_reserved(device: Device = None) -> int:
    return torch.accelerator.memory_reserved(_index(device))


def max_memory_allocated(device: Device = None) -> int:
    return torch.accelerator.max_memory_allocated(_index(device))


def reset_peak_memory_stats(device: Device = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))


def manual_seed(seed: int) -> None:
    _ops.manual_seed(current_device(), seed)


def manual_seed_all(seed: int) -> None:
    for device in range(DEVICE_COUNT):
        _ops.manual_seed(device, seed)


def get_rng_state(device: Device = None) -> torch.Tensor:
    return _ops.get_rng_state(_index(device))


def set_rng_state(state: torch.Tensor, device: Device = None) -> None:
    _ops.set_rng_state(_index(device), state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    return True
