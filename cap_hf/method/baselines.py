"""What users compare CAP with: magnitude, OBS without correlations, and SparseGPT's shared input Hessian.

- magnitude: remove the smallest |w|, move nothing.
- obs: oBERT (arXiv 2203.07259) and WoodFisher (arXiv 2004.14340): the block Fisher's saliency of each weight on its
  own, `w_p^2 / (2 A_pp)`, all ranked at once; then the weight update for the whole removed set.
- sparsegpt: after SparseGPT (arXiv 2301.00774) and OBC (arXiv 2208.11580): `H = X X^T` of a layer's inputs, one for
  all its rows, and the exact greedy elimination of each row instead of SparseGPT's fixed column order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cap_hf.config import NMPattern
from cap_hf.method.elimination import Elimination
from cap_hf.method.fisher import Batch, BlockFisher, SymmetricSums
from cap_hf.method.gradients import unfold_conv
from cap_hf.targets import Target


def rank_scores(scores: torch.Tensor, pattern: NMPattern | None) -> Elimination:
    """Remove in the order of fixed scores, `(n, B)`, lowest first; with N:M the M - N lowest of each group."""
    if pattern is None:
        losses, order = scores.sort(dim=1, stable=True)
        return Elimination(order, losses)
    groups = scores.unflatten(1, (-1, pattern.m))
    lowest = groups.sort(dim=2, stable=True).indices[..., : pattern.m - pattern.n]
    offsets = torch.arange(groups.shape[1], device=scores.device)[:, None] * pattern.m
    candidates = (lowest + offsets).flatten(1)
    losses, order = scores.gather(1, candidates).sort(dim=1, stable=True)
    return Elimination(candidates.gather(1, order), losses)


class InputHessian(BlockFisher):
    """`H = (1/N) sum x x^T` over a target's input rows: one matrix a target (one a group of a convolution).

    Takes the place of the block Fisher: `sums[name]` are `(groups, row, row)`, shared by the rows of a group, and
    the same on every process.
    """

    def _zeros(self, target: Target) -> SymmetricSums:
        dtype = torch.promote_types(target.weight.dtype, torch.float32)
        groups = getattr(target.module, "groups", 1)
        return SymmetricSums.zeros(groups, target.block_size, dtype, target.weight.device)

    @contextmanager
    def _listen(self) -> Iterator[None]:
        handles = [target.module.register_forward_hook(self._hook(target)) for target in self.targets]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _step(
        self, model: nn.Module, hooks: None, batch: Batch | None, uniforms: torch.Tensor | None, counts: list[int]
    ) -> None:
        if batch is not None:
            model(**{name: value for name, value in batch.items() if name != "labels"})

    def _hook(self, target: Target) -> Callable:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            sums = self.sums[target.name]
            inputs = args[0].to(sums.strips[0].dtype)
            if target.is_conv:
                # Patches run over channels, then the kernel; the blocks of a target the other way round.
                _, channels, height, width = module.weight.shape
                patches = unfold_conv(module, inputs).unflatten(2, (channels, height * width)).transpose(2, 3)
                rows = patches.flatten(2, 3).permute(1, 0, 3, 2).flatten(1, 2)
            else:
                rows = inputs.reshape(1, -1, inputs.shape[-1])
            sums.add(slice(None), rows)

        return hook

    def _finish(self, hooks: None) -> None:
        for sums in self.sums.values():
            for strip in sums.strips:
                self.processes.sum(strip)
        self.check_finite()

    def _traces(self, target: Target) -> torch.Tensor:
        traces = self.sums[target.name].diagonals().double().sum(dim=1)
        return traces.repeat_interleave(target.num_blocks // len(traces))

    def damped(self, target: Target, blocks: slice | torch.Tensor, damp: float) -> torch.Tensor:
        """`H + damp I` of some of this process's blocks; blocks that share one matrix get it expanded."""
        sums, owned = self.sums[target.name], self.owned[target.name]
        index = torch.arange(owned.start, owned.stop, device=target.weight.device)[blocks]
        index = index * len(sums) // target.num_blocks
        single = len(index) > 1 and bool((index == index[0]).all())
        hessian = sums.full(index[:1] if single else index).div_(self.count)
        hessian.diagonal(dim1=-2, dim2=-1).add_(damp)
        return hessian.expand(len(index), -1, -1)
