"""What is known of a block's Fisher beside its gradients: the second moment of the inputs that its weights see."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cap_hf.method.inputs import moment_size, moments_of
from cap_hf.method.sums import SymmetricSums
from cap_hf.targets import Target


@dataclass
class InputPrior:
    """Mixes the Fisher of each block with the second moment of its inputs: `F <- (1 - s) F + s G'`.

    F is a sample: of N gradients it has rank N at most, and is silent about the other directions, which the damp then
    fills with the identity. The Kronecker-factored Fisher (K-FAC, arXiv 1503.05671, section 3) takes the inputs of a
    layer and the gradients of its outputs for independent: the Fisher of a row is then `E[g^2] E[x x^T]`, the second
    moment of the inputs but for a factor, and rows are independent where outputs' gradients are. The moment is known
    from all tokens of all examples, many more than there are gradients. To join a loss's own curvature with that of a
    layer's output is MOONSHOT's idea (arXiv 2604.13287).

    Here `G' = c sum x x^T`, for each row of a block with the c that gives it the trace that its part of F has: losses
    stay in units of the training loss, and so does the damp. What has no gradient has no prior either.

    Attributes:
        moments: for each target's name the sums of `cap_hf.method.inputs.input_rows`, of all processes.
        strength: s in [0, 1).
    """

    moments: Mapping[str, SymmetricSums]
    strength: float

    def __post_init__(self) -> None:
        self._known: tuple[str, list[int]] | None = None
        self.release()

    def of(self, target: Target, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the moments that some blocks of a target are mixed with.

        Args:
            target: whose blocks they are.
            blocks: `(n,)` their numbers in the target.

        Returns:
            The moments, whole, `(m, s, s)` in float64; and which of them each row of a block has, `(n, rows)`.
        """
        found, places = moments_of(target, blocks).unique(return_inverse=True)
        key = (target.name, found.tolist())
        # Blocks come in batches, and most batches of a target have the same moments.
        if key != self._known:
            self.release()
            self._known, self._moments = key, self.moments[target.name].full(found)
        return self._moments, places

    def release(self) -> None:
        """Give back the memory of the moments that the last blocks were mixed with."""
        self._known, self._moments = None, torch.empty(0)

    def mix(self, fisher: torch.Tensor, target: Target, blocks: torch.Tensor) -> torch.Tensor:
        """Mix the Fishers of some blocks with their priors, in place.

        Args:
            fisher: `(n, B, B)` in float64, without a damp.
            target: whose blocks they are.
            blocks: `(n,)` their numbers in the target.

        Returns:
            `fisher`, each row's part of it with the trace that it had.
        """
        strength, size = self.strength, moment_size(target)
        traces = fisher.diagonal(dim1=1, dim2=2).unflatten(1, (-1, size)).sum(dim=2)
        fisher.mul_(1 - strength)
        priors, places = self.of(target, blocks)
        whole = traces_of(priors)
        for row, place in enumerate(places.unbind(dim=1)):
            # Inputs that are all 0 have no gradient: whatever their moment of 0 is divided by, they get no prior.
            scale = strength * traces[:, row] / whole.masked_fill(whole == 0, 1.0)[place]
            part = slice(row * size, (row + 1) * size)
            # A matrix that all blocks have in common is not copied for each.
            own = priors if len(priors) == 1 else priors[place]
            fisher[:, part, part].addcmul_(own, scale[:, None, None])
        return fisher


def traces_of(matrices: torch.Tensor) -> torch.Tensor:
    """Return the traces `(n,)` of matrices `(n, B, B)`."""
    return matrices.diagonal(dim1=1, dim2=2).sum(dim=1)
