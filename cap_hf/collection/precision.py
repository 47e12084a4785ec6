"""The precision that a model needs, and that CUDA multiplies in, whatever the user has asked for elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from cap_hf.errors import CAPError
from cap_hf.targets import Target


def check_precision(targets: Sequence[Target], device: torch.device) -> None:
    """Raise a CAPError if targets are in half precision, or a device lacks the solver's float64."""
    half = {target.weight.dtype for target in targets} & {torch.float16, torch.bfloat16}
    if half:
        raise CAPError(f"the model is in {half.pop()}: load it in float32 to collect gradients, or to refit it")
    if device.type == "mps":
        raise CAPError("Apple's MPS has no float64, which the solver needs: set ACCELERATE_USE_CPU=true")


@contextmanager
def matmul_precision(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 matrices on CUDA as gradients rounded to `dtype` ask for; what was set before is put back.

    Args:
        dtype: float32 multiplies in float32, also where `--tf32` or `torch.compile` has switched that off; bfloat16 in
            tf32, which holds a bfloat16 exactly and is several times as fast.
    """
    matmul = torch.backends.cuda.matmul
    # PyTorch before 2.9 has only the older of the two switches; reading one after the other was set is an error there.
    name, exact, fast = ("fp32_precision", "ieee", "tf32") if hasattr(matmul, "fp32_precision") else OLD_SWITCH
    before = getattr(matmul, name)
    setattr(matmul, name, exact if dtype == torch.float32 else fast)
    try:
        yield
    finally:
        setattr(matmul, name, before)


OLD_SWITCH = ("allow_tf32", False, True)
