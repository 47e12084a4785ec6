"""Whether bfloat16 pays on this processor."""

import logging
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from cap_hf.errors import CAPError

logger = logging.getLogger(__name__)

# Seconds in bfloat16 over seconds in float32. Below the first the difference is noise. A processor without bfloat16
# instructions lies far above the second (a training step was measured to take 15 times as long), and nobody who waits
# for that gains anything: memory would be saved, but in days instead of hours.
NOTABLE_RATIO = 1.1
REFUSED_RATIO = 4.0


def check_bfloat16(options: Sequence[str]) -> None:
    """Measure whether bfloat16 is slower than float32 on this processor: say so in a line, or refuse where it is far.

    Args:
        options: the arguments that ask for bfloat16, as the line names them.

    Raises:
        CAPError: bfloat16 takes more than `REFUSED_RATIO` times as long.
    """
    ratio = bfloat16_ratio()
    message = (
        f"bfloat16 takes this processor {ratio:.1f} times as long as float32: leave out {' and '.join(options)} "
        "(fast are processors that list avx512_bf16, amx_bf16 or, on Arm, bf16 in /proc/cpuinfo)"
    )
    if ratio > REFUSED_RATIO:
        raise CAPError(message)
    if ratio > NOTABLE_RATIO:
        logger.warning(message)


@torch.inference_mode()
def bfloat16_ratio() -> float:
    """Return the seconds of a small matrix product in bfloat16 over those in float32, the best of three each."""
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    operands = {dtype: (torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)) for dtype in best}
    # The first turn warms up; whatever else the machine does meets both.
    for turn in range(4):
        for dtype, (inputs, weight) in operands.items():
            start = time.perf_counter()
            F.linear(inputs, weight)
            if turn:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] / best[torch.float32]
