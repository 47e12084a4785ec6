"""The losses whose gradients make the Fisher: cross entropy with labels of the data or the model, error of features."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from cap_hf.errors import CAPError
from cap_hf.outputs import features_of, logits_of


class FisherLoss(Protocol):
    """A loss that the Fisher is the curvature of, through the gradients of single examples.

    Attributes:
        name: as `CAPConfig.fisher_loss` has it.
        repeats: gradient samples per example.
        needs_labels: whether every batch must have `labels`.
    """

    name: str
    repeats: int
    needs_labels: bool

    def draws(self, count: int, seed: int) -> torch.Tensor | None:
        """Return what is random in so many gradient samples, `(count,)`, or None where nothing is."""
        ...

    def __call__(self, outputs: Any, labels: torch.Tensor | None, draws: torch.Tensor | None) -> torch.Tensor:
        """Return the loss of a batch, summed over its examples.

        Args:
            outputs: what the model made of the batch.
            labels: `(b,)` or None.
            draws: those of its examples, `(b,)`.
        """
        ...


class LabelLoss:
    """Cross entropy with the data's labels: the empirical Fisher (arXiv 2210.09223, section 2)."""

    name, repeats, needs_labels = "labels", 1, True

    def draws(self, count: int, seed: int) -> None:
        """Return None: nothing is random."""

    def __call__(self, outputs: Any, labels: torch.Tensor | None, draws: torch.Tensor | None) -> torch.Tensor:
        """Return the summed cross entropy; errors as of `cross_entropy`."""
        if labels is None:
            raise CAPError("a batch has no labels: add them, or use fisher_loss='sampled', which needs none")
        return cross_entropy(logits_of(outputs), labels)


class SampledLabelLoss:
    """Cross entropy with labels drawn from the model's distribution: its true Fisher (arXiv 1905.12558, section 2)."""

    name, repeats, needs_labels = "sampled", 1, False

    def draws(self, count: int, seed: int) -> torch.Tensor:
        """Return numbers in [0, 1), drawn for all examples at once, so that each gets the same label in any process."""
        return torch.rand(count, generator=torch.Generator().manual_seed(seed))

    def __call__(self, outputs: Any, labels: torch.Tensor | None, draws: torch.Tensor | None) -> torch.Tensor:
        """Return the summed cross entropy."""
        assert draws is not None
        logits = logits_of(outputs)
        return cross_entropy(logits, sample_labels(logits, draws))


@dataclass
class FeatureLoss:
    """Squared error of the features to those of the model as it is, through random projections of them.

    The error is `1/2 sum_k w_k / (n_k d_k) |(f_k - f_k0) / s_k|^2` over the parts k of the features, n_k positions of
    d_k channels each with its deviation s_k. At f = f0 its gradient is 0 and its Hessian the Gauss-Newton matrix
    `J^T D J`, D the factors `w / (n d s^2)`. The gradient g of `sum_k u_k sqrt(D_k) f_k` with independent signs u has
    `E[g g^T] = J^T D J` (Hutchinson's estimator; as Kunstner et al., arXiv 1905.12558, section 2, sample labels).

    Attributes:
        weights: w of each kind of part: class, patch, pooled. Parts of the same kind share it.
        prefix_tokens: as `features_of` takes it.
        repeats: projections per example.
        deviations: for each part's name s `(d,)` over the calibration examples; see `Deviations`.
    """

    weights: Mapping[str, float]
    prefix_tokens: int = 0
    repeats: int = 1
    deviations: dict[str, torch.Tensor] = field(default_factory=dict)
    name = "features"
    needs_labels = False

    def draws(self, count: int, seed: int) -> torch.Tensor:
        """Return a seed per gradient sample: an example has the same projection in whatever batch it lies."""
        return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed))

    def __call__(self, outputs: Any, labels: torch.Tensor | None, draws: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of the projections; errors as of `features_of` and `features`."""
        assert draws is not None
        parts = self.features(outputs)
        kinds = [name.split()[0] for name in parts]
        sizes = {name: part[0].numel() for name, part in parts.items()}
        signs = random_signs(draws, sum(sizes.values())).to(next(iter(parts.values())).device)
        total = torch.zeros((), device=signs.device)
        for (name, part), sign in zip(parts.items(), signs.split(list(sizes.values()), dim=1), strict=True):
            weight = self.weights[name.split()[0]] / kinds.count(name.split()[0])
            factor = (weight / sizes[name]) ** 0.5 * inverse(self.deviations[name]).to(part.device)
            total = total + (sign.to(part.dtype).view_as(part) * part * factor).sum()
        return total

    def features(self, outputs: Any) -> dict[str, torch.Tensor]:
        """Return the parts of the features that have a weight.

        Raises:
            CAPError: none has.
        """
        found = features_of(outputs, self.prefix_tokens)
        parts = {name: part for name, part in found.items() if self.weights[name.split()[0]] > 0}
        if not parts:
            raise CAPError(
                f"the model's features are {', '.join(found)}, and none of these has a weight: give one to it, such as "
                f"--{next(iter(found)).split()[0]}_weight 1"
            )
        return parts


class Deviations:
    """The standard deviation of every channel of the features, over examples and positions.

    Attributes:
        moments: for each part's name `(3, d)` in float64: how many values there are, their sum, the sum of their
            squares.
    """

    def __init__(self) -> None:
        self.moments: dict[str, torch.Tensor] = {}

    def add(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Add a batch's features, `(b, n, d)` by part."""
        for name, part in parts.items():
            values = part.detach().flatten(0, 1).double()
            sums = torch.stack([torch.ones_like(values).sum(0), values.sum(0), values.square().sum(0)])
            self.moments[name] = self.moments.get(name, 0) + sums

    def finish(self) -> dict[str, torch.Tensor]:
        """Return each part's deviations `(d,)` in float32."""
        found = {}
        for name, (count, total, squares) in self.moments.items():
            variance = (squares / count - (total / count).square()).clamp_min(0)
            found[name] = variance.sqrt().float()
        return found


def inverse(deviations: torch.Tensor, floor: float = 1e-3) -> torch.Tensor:
    """Return `1 / s` of channels; 0 of one that does not vary, which says nothing of any weight.

    A channel whose deviation is below `floor` of the largest is taken as if it had that: what is all but constant
    would else count as much as what tells images apart.
    """
    least = floor * deviations.max()
    return torch.where(deviations > 0, 1 / deviations.clamp_min(least), 0.0)


def random_signs(seeds: torch.Tensor, size: int) -> torch.Tensor:
    """Return `(b, size)` int8 of -1 and 1, each row from its own seed."""
    rows = [
        torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
        for seed in seeds.tolist()
    ]
    return torch.stack(rows) * 2 - 1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy summed over examples (arXiv 2210.09223, section 2, the loss L of the empirical Fisher).

    Args:
        logits: `(b, classes)`.
        labels: `(b,)`.

    Raises:
        CAPError: a label is none of the classes.
    """
    check_labels(labels, logits.shape[-1])
    return F.cross_entropy(logits.float(), labels.long(), reduction="sum")


def sample_labels(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return labels `(b,)` drawn from the model's own distribution, by inverting its cumulative sum.

    Args:
        logits: `(b, classes)`.
        uniforms: `(b,)` in [0, 1), one number per example.
    """
    cumulative = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms.to(cumulative)[:, None])[:, 0]
    return drawn.clamp_max(logits.shape[-1] - 1)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raise a CAPError if a label is none of the classes, -100 among them, which training would pass over."""
    if labels.is_floating_point() or labels.dim() != 1:
        raise CAPError(
            f"labels must be whole numbers (b,), one per example, not {labels.dtype} {tuple(labels.shape)}: of one-hot "
            "rows take labels.argmax(dim=1)"
        )
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise CAPError(
            f"a calibration example has label {int(labels[wrong][0])}, the model has classes 0 to {classes - 1}: leave "
            "examples without a label out, or use fisher_loss='sampled', which needs none"
        )
