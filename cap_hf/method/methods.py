"""The methods that can be asked for, each with the steps in which it differs from the others."""

from dataclasses import dataclass

import torch

from cap_hf.config import CAPConfig
from cap_hf.method.baselines import input_scores, rank_scores, saliencies, unit_scores
from cap_hf.method.elimination import decouple, eliminate_fisher
from cap_hf.method.inverses import invert
from cap_hf.method.panels import Elimination
from cap_hf.method.reconstruction import independent_update, reconstruct_each
from cap_hf.patterns import Pattern, unit_of


@dataclass(frozen=True)
class Method:
    """A way to prune: what is summed, in which order weights go, how the others move.

    Attributes:
        name: as `CAPConfig.method` has it.
        statistic: what is summed over the calibration examples: "gradients", "inputs", or None for nothing.
        default_damp: relative to the mean diagonal; what measured best one-shot, or the method's own published value.
        whole_rows: whether a block is always a row.
        inverts: whether each block's Fisher is inverted; one that is only looked at is not copied per block.
        refit: whether what is left is refitted after pruning where the config does not say; not what baselines publish.
        sequential: whether a refit also chooses anew what is left in each layer, for what really reaches it.
    """

    name: str
    statistic: str | None
    default_damp: float
    whole_rows: bool = False
    inverts: bool = True
    refit: bool = False
    sequential: bool = False

    def damp(self, config: CAPConfig) -> float:
        """Return the damp that a config asks for, or the method's default."""
        return self.default_damp if config.damp is None else config.damp

    def has_prior(self, config: CAPConfig) -> bool:
        """Return whether a config mixes the Fisher with the moments of the layers' inputs: only one of gradients."""
        return self.statistic == "gradients" and config.fisher_prior == "input" and config.prior_strength > 0

    def block_size(self, config: CAPConfig) -> int | str:
        """Return the block size that a config asks for, or "row" where the method knows no other."""
        return "row" if self.whole_rows else config.fisher_block_size

    def refits(self, config: CAPConfig) -> bool:
        """Return whether a config asks for a refit after pruning, or the method's default does."""
        return self.refit if config.refit is None else config.refit

    def eliminate(self, weights: torch.Tensor, fisher: torch.Tensor | None, pattern: Pattern | None) -> Elimination:
        """Return the order in which the weights of blocks go, and what each removal costs.

        CAP: greedily, each removal moving the others (arXiv 2210.09223, Algorithm 1). With the second moment of a
        layer's inputs for F it is the exact greedy order of OBC (arXiv 2208.11580, section 4), where SparseGPT (arXiv
        2301.00774) goes through the columns in a fixed one.

        Args:
            weights: `(n, B)` in float64. Entries that are 0 go first and cost nothing.
            fisher: `(n, B, B)` damped; None where nothing is summed. May be overwritten.
            pattern: N:M, blocks, or None.

        Raises:
            NotInvertibleError: a Fisher is not positive definite.
            LostPivotError: rounding destroyed a pivot.
        """
        return eliminate_fisher(weights, decouple(required(fisher), weights == 0), pattern)

    def reconstruct(
        self,
        weights: torch.Tensor,
        fisher: torch.Tensor | None,
        turns: torch.Tensor,
        counts: torch.Tensor,
        update: str,
    ) -> torch.Tensor:
        """Return the new weights of blocks for several numbers of removals, `(times, n, B)`, 0 but for survivors.

        Args:
            weights: `(n, B)` before pruning, in float64.
            fisher: `(n, B, B)` damped; None where nothing is summed.
            turns, counts: as of `reconstruct_each`; a weight that is 0 already survives no time.
            update: how the survivors move, as `CAPConfig.weight_update` has it.

        Raises:
            NotInvertibleError: a Fisher is not positive definite.
        """
        if update == "joint":
            return reconstruct_each(weights, required(fisher), turns, counts)
        keep = turns >= counts[..., None]
        if update == "independent":
            inverse = invert(decouple(required(fisher), weights == 0))
            return torch.stack([independent_update(weights, inverse, each) for each in keep])
        return torch.where(keep, weights, 0.0)


class OBS(Method):
    """The block Fisher without correlations: oBERT (arXiv 2203.07259) and WoodFisher (arXiv 2004.14340)."""

    def eliminate(self, weights: torch.Tensor, fisher: torch.Tensor | None, pattern: Pattern | None) -> Elimination:
        """Return all weights ranked at once, each by what its own removal costs (oBERT, equation 2)."""
        return rank_scores(saliencies(weights, invert(decouple(required(fisher), weights == 0)), pattern), pattern)


class Magnitude(Method):
    """The smallest weights go, and nothing moves (Han et al., arXiv 1506.02626)."""

    def eliminate(self, weights: torch.Tensor, fisher: torch.Tensor | None, pattern: Pattern | None) -> Elimination:
        """Return all units ranked by their squares."""
        return rank_scores(unit_scores(weights.square(), pattern), pattern)

    def reconstruct(
        self,
        weights: torch.Tensor,
        fisher: torch.Tensor | None,
        turns: torch.Tensor,
        counts: torch.Tensor,
        update: str,
    ) -> torch.Tensor:
        """Return the survivors as they are."""
        return super().reconstruct(weights, None, turns, counts, "none")


class Wanda(Magnitude):
    """In every row the smallest products of a weight and the norm of its input go (arXiv 2306.11695); nothing moves.

    Scores are compared within a row alone, the comparison group of its section 3. So that every allocation gives all
    rows the same share, the loss of a row's k-th removal is its rank, `k / B`.
    """

    def eliminate(self, weights: torch.Tensor, fisher: torch.Tensor | None, pattern: Pattern | None) -> Elimination:
        """Return all weights of a row ranked by their scores, with their ranks for losses."""
        order = rank_scores(unit_scores(input_scores(weights, required(fisher)), pattern), pattern).order
        units = weights.shape[1] // unit_of(pattern)
        ranks = torch.arange(1, order.shape[1] + 1, dtype=weights.dtype, device=weights.device) / units
        return Elimination(order, ranks.expand(order.shape))


def required(fisher: torch.Tensor | None) -> torch.Tensor:
    """Return the Fisher of a method that sums something; without one it cannot go on."""
    if fisher is None:
        raise ValueError("this method needs a Fisher: only one whose statistic is None does without")
    return fisher


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("cap", "gradients", default_damp=5e-4, refit=True),
        OBS("obs", "gradients", default_damp=5e-4),
        Method("sparsegpt", "inputs", default_damp=1e-2, whole_rows=True, sequential=True),
        Wanda("wanda", "inputs", default_damp=0.0, whole_rows=True, inverts=False),
        Magnitude("magnitude", None, default_damp=0.0, inverts=False),
    )
}
