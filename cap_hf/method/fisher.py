"""The block Fisher, from what was summed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cap_hf.errors import CAPError
from cap_hf.kernels.build import has_kernels
from cap_hf.method.inputs import moments_of
from cap_hf.method.prior import InputPrior, traces_of
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target


@dataclass
class BlockFisher:
    """`F_b = (1/N) sum g_b g_b^T` of every block, and the damp of every target (arXiv 2210.09223, section 2).

    For SparseGPT and Wanda the sums are of a layer's inputs instead of its gradients, and all blocks of a group share
    one.

    Attributes:
        sums: for each target's name the sums of the blocks that are `owned`, or with `shared` of its groups.
        count: N, how many gradient samples (examples, of inputs) they hold.
        damps: for each target's name what is added to the diagonal, absolute.
        owned: for each target's name the blocks that this process eliminates and solves for; of a target of which a
            part of the sums is there at a time, those of the part.
        shared: whether the blocks of a group have one matrix.
        prior: what F is mixed with; None for nothing but the damp.
    """

    sums: Mapping[str, SymmetricSums]
    count: int
    damps: dict[str, float]
    owned: dict[str, slice]
    shared: bool = False
    prior: InputPrior | None = None

    def damped(self, target: Target, blocks: slice | torch.Tensor, damp: float | None = None) -> torch.Tensor:
        """Return `F + damp I`, F mixed with its prior, of some of the owned blocks of a target, `(n, B, B)` in float64.

        Args:
            target: whose blocks they are.
            blocks: counted from the first one owned.
            damp: None for the target's own.

        Returns:
            A new tensor; of blocks that share one matrix that matrix, expanded.
        """
        sums, damp = self.sums[target.name], self.damps[target.name] if damp is None else damp
        owned = self.owned[target.name]
        numbers = torch.arange(owned.start, owned.stop, device=target.weight.device)[blocks]
        if not self.shared:
            if has_kernels(sums.strips[0], torch.float32):
                return self._assembled(target, numbers, damp)
            fisher = sums.full(blocks).div_(self.count)
            return add_damp(fisher if self.prior is None else self.prior.mix(fisher, target, numbers), damp)
        index = moments_of(target, numbers)[:, 0]
        single = len(index) > 1 and bool((index == index[0]).all())
        matrices = add_damp(sums.full(index[:1] if single else index).div_(self.count), damp)
        return matrices.expand(len(index), -1, -1)

    def release(self) -> None:
        """Give back what is kept from one `damped` to the next."""
        if self.prior is not None:
            self.prior.release()

    def _assembled(self, target: Target, numbers: torch.Tensor, damp: float) -> torch.Tensor:
        """Return what `damped` does of blocks by their numbers in the target, in one go through memory."""
        strength = 0.0
        moments, places = torch.empty(0, 1, 1, dtype=torch.float64), numbers.new_empty(len(numbers), 0)
        if self.prior is not None:
            strength = self.prior.strength
            moments, places = self.prior.of(target, numbers)
        sums, first = self.sums[target.name], self.owned[target.name].start
        parts = (moments, traces_of(moments), places.contiguous())
        return torch.ops.cap_hf.assemble(sums.strips, numbers - first, self.count, strength, *parts, damp)


def add_damp(fisher: torch.Tensor, damp: float) -> torch.Tensor:
    """Add `damp I` to matrices `(n, B, B)`, in place (arXiv 2210.09223, section 2: the dampened Fisher)."""
    fisher.diagonal(dim1=-2, dim2=-1).add_(damp)
    return fisher


def damps_of(means: dict[str, float], damp: float, absolute: bool) -> dict[str, float]:
    """Return what is added to the diagonal of each target's F: `damp`, relative to its mean diagonal or as it is.

    A target without any gradient takes the mean damp of the others.

    Args:
        means: for each target's name the mean of the diagonals of its F.
        damp: relative or absolute.
        absolute: whether `damp` is taken as it is.

    Raises:
        CAPError: no target has a gradient.
    """
    alive = [mean for mean in means.values() if mean > 0]
    if not alive:
        raise CAPError("all gradients are 0: the loss does not depend on any target")
    fallback = sum(alive) / len(alive)
    return {name: damp if absolute else damp * (mean or fallback) for name, mean in means.items()}
