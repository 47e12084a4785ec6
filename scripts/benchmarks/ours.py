"""The steps of cap_hf that are compared with the published ones: every call into the package's core is here."""

import torch
from torch import nn

from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.passes import mean_diagonals
from cap_hf.distributed.processes import Processes
from cap_hf.method.elimination import eliminate
from cap_hf.method.fisher import BlockFisher, damps_of
from cap_hf.method.inverses import invert
from cap_hf.method.panels import Elimination
from cap_hf.targets import Target

# Blocks solved at a time.
CHUNK = 64


class OurFisher:
    """The block Fisher of one layer of `num_blocks` rows, a block each.

    Args:
        num_blocks, block_size: blocks and B.
        damp: relative to the mean of the diagonal.
    """

    def __init__(self, num_blocks: int, block_size: int, damp: float) -> None:
        self.target = Target("layer", nn.Linear(block_size, num_blocks, bias=False), block_size)
        self.statistic, self.damp = GradientSums([self.target]), damp

    def add(self, gradients: torch.Tensor) -> None:
        """Take gradients `(samples, num_blocks, B)` into the sums."""
        self.statistic.add(self.target, StoredGradients(gradients))
        self.statistic.count += len(gradients)

    def parts(self) -> list[slice]:
        """Return the blocks that are solved together."""
        return [slice(start, start + CHUNK) for start in range(0, self.target.num_blocks, CHUNK)]

    def resolved_damp(self) -> float:
        """Return the damp that is added to the diagonals, once all gradients are there."""
        return damps_of(mean_diagonals(self.statistic, Processes()), self.damp, absolute=False)[self.target.name]

    def inverse(self, part: slice, damp: float) -> torch.Tensor:
        """Return the inverses `(blocks, B, B)` of one of `parts`."""
        everything = {self.target.name: slice(0, self.target.num_blocks)}
        fisher = BlockFisher(self.statistic.sums, self.statistic.count, {self.target.name: damp}, everything)
        return invert(fisher.damped(self.target, part))

    @staticmethod
    def eliminate(weights: torch.Tensor, inverse: torch.Tensor) -> Elimination:
        """Remove the weights `(n, B)` of n blocks, cheapest first, with inverses `(n, B, B)`."""
        return eliminate(weights, inverse)


class StoredGradients:
    """Gradients that are there already, `(samples, rows, row)`, in the place of a layer's factors."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients, self.samples = gradients, len(gradients)

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write the gradients of these rows into `out`."""
        out.copy_(self.gradients[:, start:stop])
