"""What work takes: measured on this machine, or on paper, from what the maker of a GPU states."""

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cap_hf.collection import solver
from cap_hf.collection.costs import Costs, forward, forward_seconds
from cap_hf.collection.forecast import Trials, trial_seconds
from cap_hf.collection.hardware import Hardware
from cap_hf.collection.resources import Resources
from cap_hf.collection.room import HEAD_ROOM
from cap_hf.collection.running import Batch, frozen
from cap_hf.config import CAPConfig
from cap_hf.method.methods import METHODS
from cap_hf.method.panels import PANEL
from cap_hf.patterns import unit_of

# Of the stated rates, what is taken to be reached: of arithmetic in matrix products of a model's sizes, and of memory.
REACHED, READ = 0.4, 0.6
# Seconds of a kernel's launch, and how many a panel of the elimination has (docs/scaling.md).
LAUNCH, LAUNCHES = 5e-6, 32
# Kernels of each of a panel's steps where weights go in units of several: there is no kernel for all of them.
UNIT_LAUNCHES = 30
# Seconds that a step waits for the one before it, and how many blocks of a batch wait side by side.
STEP, SIDE_BY_SIDE = 3e-6, 100
# Bytes that a GPU's libraries take before anything else.
CONTEXT = 1e9
# Operations of a gradient sample for one of its forward pass: forward, backward to the inputs, and the gradients of
# single examples, which have as many multiplications.
PASSES = 3
# Operations a block of size B takes, for B^3: Cholesky and the inverse from it, the products that end the panels of an
# elimination, and the factor for the weights that are left; B^2 more for each sparsity that is solved for with it.
INVERSION, PANELS, SOLVE = 2.0, 2 / 3, 2 / 3
# How often the end of a panel reads or writes the block: copied twice to drop what was removed, brought up to date.
COPIES = 7


class Clock:
    """Says what work takes on this machine, by trying it.

    Args:
        device: that does it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def available(self, resources: Resources, costs: Costs) -> int | None:
        """Return the bytes that may be taken beside the model; None for what is free when that is asked."""
        return None

    def timed(self, costs: Costs, forward: float, config: CAPConfig) -> Costs:
        """Return the costs of a gradient sample with its seconds; `forward` are those of an example."""
        return costs

    def forward(self, model: nn.Module, batch: Batch, dtype: torch.dtype | None = None) -> float:
        """Return the seconds that an example takes through a model, without gradients (see `forward_seconds`)."""
        return forward_seconds(model, batch, dtype)

    def trials(self, config: CAPConfig) -> Trials:
        """Return the seconds of blocks by their size."""
        return Trials(lambda size: trial_seconds(config, size, self.device))


class PaperClock(Clock):
    """Says what work would take on a GPU that is not there.

    Args:
        hardware: the GPU.
    """

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(torch.device("cuda"))
        self.hardware = hardware

    def available(self, resources: Resources, costs: Costs) -> int | None:
        """Return what a GPU with nothing but the model on it has free, or what the resources allow of that."""
        free = int((self.hardware.memory - CONTEXT - costs.model) * HEAD_ROOM)
        return free if resources.bytes is None else min(free, resources.bytes - costs.model)

    def timed(self, costs: Costs, forward: float, config: CAPConfig) -> Costs:
        """Return costs that were measured in bytes, with seconds from the operations of a forward pass.

        Outer products of a step's samples are summed at the rate of arithmetic or of memory, whichever is lower: each
        step reads and writes all sums in float32.
        """
        times = PASSES if METHODS[config.method].statistic == "gradients" else 1
        summed = self.hardware.bandwidth * READ * max(costs.samples, 1) / 8
        multiplications = min(self.hardware.float32 * REACHED / 2, summed)
        return replace(costs, seconds=times * forward * config.samples_per_grad, multiplications=multiplications)

    def forward(self, model: nn.Module, batch: Batch, dtype: torch.dtype | None = None) -> float:
        """Return the seconds of an example by its operations; `dtype` as in mixed precision."""
        rate = self.hardware.bfloat16 if dtype == torch.bfloat16 else self.hardware.float32
        return forward_operations(model, batch) / (rate * REACHED)

    def trials(self, config: CAPConfig) -> Trials:
        """Return what blocks take on paper."""
        unit = unit_of(config.structure)
        return Trials(lambda size: self.block_seconds(size, unit))

    def block_seconds(self, size: int, unit: int = 1) -> tuple[float, float, float]:
        """Return the seconds of a block's elimination in float32, of its reconstruction in float64, and of one more."""
        gpu, cube = self.hardware, float(size) ** 3
        arithmetic = (INVERSION + PANELS) * cube / (gpu.float32 * REACHED)
        # A step of a panel reads the columns of those before it.
        moved = 4 * (COPIES * cube / (3 * PANEL) + PANEL * float(size) ** 2 / 4) / (gpu.bandwidth * READ)
        # All blocks of a batch share the launches of its panels.
        batch = max(1, solver.MOST_DEVICE_BYTES // (8 * size**2))
        launches = LAUNCHES if unit == 1 else UNIT_LAUNCHES * PANEL
        waited = LAUNCH * launches * math.ceil(size / PANEL) + STEP * size * math.ceil(batch / SIDE_BY_SIDE)
        eliminated = arithmetic + moved + waited / batch
        # The triangle is read again, and all of F to say what the change costs.
        again = 1.5 * 8 * float(size) ** 2 / (gpu.bandwidth * READ)
        return eliminated, SOLVE * cube / (gpu.float64 * REACHED), again


def forward_operations(model: nn.Module, batch: Batch) -> float:
    """Return the floating point operations of an example's forward pass, counted by PyTorch on one example."""
    one = {name: value[:1] for name, value in batch.items() if name != "labels"}
    # What fused attention does is not counted on a CPU; the products that it is made of are.
    with frozen(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(model, one)
    return float(counter.get_total_flops())
