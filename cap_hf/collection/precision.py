"""In which precision CUDA multiplies float32 matrices, whatever the user has asked for elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
