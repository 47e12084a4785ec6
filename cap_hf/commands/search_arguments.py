"""The arguments of a search for a sparsity, and of a series of sparsities; checked before anything is loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal, DecimalException

from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError

# What a drop is measured in: see `cap_hf.commands.searching`.
DROP_METRICS = ("top1", "loss", "knn", "cosine")
# A range of more sparsities than this is a slip: each of them is a checkpoint.
MOST = 1000


@dataclass
class SearchArguments:
    """How to find the sparsity, where a drop is given in place of it.

    Raises:
        CAPError: a value is outside what its field allows, or there is no drop to search by.
    """

    max_accuracy_drop: float | None = field(
        default=None,
        metadata={
            "help": "Instead of --sparsity: prune to the highest one that loses no more than this to the dense model, "
            "on train images that are held out. An absolute share: 0.01 is one point of top-1."
        },
    )
    max_drop_metric: str | None = field(
        default=None,
        metadata={
            "help": "What is lost: top1; loss (rise of the cross entropy, in nats); without a head knn (top-1 of the "
            "nearest neighbours) or cosine (1 - mean cosine of the features to the dense model's). Default: top1, or "
            "without a head knn, or without labels cosine.",
            "choices": DROP_METRICS,
        },
    )
    sparsity_step: float = field(default=0.01, metadata={"help": "The sparsity that is found is a multiple of this."})
    max_evaluations: int = field(default=8, metadata={"help": "Sparse models that are measured to find it, at most."})
    max_search_samples: int = field(
        default=2000, metadata={"help": "Train images that are held out to measure them on, where there are as many."}
    )

    def __post_init__(self) -> None:
        if self.max_accuracy_drop is None:
            given = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
            if given:
                raise CAPError(f"--{given[0]} is for a search: say what may be lost, such as --max_accuracy_drop 0.01")
            return
        most = math.inf if self.max_drop_metric == "loss" else 1
        if not 0 <= self.max_accuracy_drop <= most or math.isinf(self.max_accuracy_drop):
            allowed = "at least 0, and finite" if self.max_drop_metric == "loss" else "in [0, 1]: 0.01 is one point"
            raise CAPError(f"max_accuracy_drop={self.max_accuracy_drop:g} must be {allowed}")
        if not 1e-6 <= self.sparsity_step < 1:
            raise CAPError(f"sparsity_step={self.sparsity_step:g} must be at least 1e-06 and less than 1")
        for name in ("max_evaluations", "max_search_samples"):
            if getattr(self, name) < 1:
                raise CAPError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def most_evaluations(self) -> int:
        """Return how many models are measured at most: as many as halve what is left of the multiples of the step."""
        return min(self.max_evaluations, int(1 / self.sparsity_step).bit_length())

    @property
    def num_images(self) -> int:
        """Return how many images are held out, 0 where nothing is searched for."""
        return 0 if self.max_accuracy_drop is None else self.max_search_samples


def check_search(args: SearchArguments, amounts: Sequence[str] | None, recomputations: int, config: CAPConfig) -> None:
    """Check that a search goes with the other arguments.

    Args:
        args: of the search, if there is one.
        amounts: sparsities or budgets, as they were given.
        recomputations: as of `PruneArguments`.
        config: how to prune.

    Raises:
        CAPError: a sparsity is given too, or follows from the pattern, or each would have collections of its own.
    """
    if args.max_accuracy_drop is None:
        return
    if amounts:
        raise CAPError("--max_accuracy_drop finds the sparsity: leave out --sparsity and --budget, or that")
    if config.nm is not None:
        raise CAPError(f"{config.nm} has one sparsity, and there is nothing to find: leave out --max_accuracy_drop")
    if recomputations:
        raise CAPError("--max_accuracy_drop searches in a single collection: leave out --num_recomputations")


def read_sparsities(texts: Sequence[str | float]) -> list[float]:
    """Return the sparsities that were written as numbers, or as ranges `begin:end:step` with the end in it.

    Each text may hold several, with spaces between them. Ranges are exact in decimals: 0.5:0.9:0.1 has 0.7 in it.

    Raises:
        CAPError: one is neither, or a range is empty, has too many numbers, or does not arrive at its end.
    """
    return [float(number) for text in texts for each in str(text).split() for number in _numbers(each)]


def _numbers(text: str) -> list[Decimal]:
    try:
        parts = [Decimal(part) for part in text.split(":")]
    except DecimalException as error:
        raise CAPError(f"sparsity {text!r} is no number, and no range such as 0.5:0.95:0.05") from error
    if len(parts) == 1:
        # A signaling NaN is no float.
        if not parts[0].is_finite():
            raise CAPError(f"sparsity {text} is not in [0, 1)")
        return parts
    if len(parts) != 3 or not all(part.is_finite() for part in parts):
        raise CAPError(f"sparsity {text!r} is no range: that is begin:end:step, such as 0.5:0.95:0.05")
    begin, end, step = parts
    if step <= 0 or end < begin:
        raise CAPError(f"sparsity {text!r} has nothing in it: begin:end:step goes up, such as 0.5:0.95:0.05")
    for each in (begin, end):
        if not 0 <= each < 1:
            raise CAPError(f"sparsity {each} is not in [0, 1)")
    try:
        steps = (end - begin) / step
    except DecimalException:  # more than a decimal can hold
        steps = Decimal(MOST)
    if steps >= MOST:
        raise CAPError(
            f"sparsity {text!r} has more than {MOST} sparsities, and each is a checkpoint: take a larger step"
        )
    if steps != int(steps):
        last = begin + int(steps) * step
        raise CAPError(f"sparsity {text!r} goes from {last} to {last + step}: end it at one of them")
    return [begin + number * step for number in range(int(steps) + 1)]
