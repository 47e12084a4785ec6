"""CAPConfig: every knob of a pruning run, validated, with a JSON round trip."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path

from cap_hf.errors import CAPError
from cap_hf.patterns import BLOCK_PATTERNS, NMPattern, Pattern

CONFIG_NAME = "cap_config.json"
METHODS = ("cap", "obs", "sparsegpt", "wanda", "magnitude")
SELECTIONS = ("marginal", "cumulative")
FISHER_LOSSES = ("labels", "sampled", "features")
# What earlier versions called the first two, in checkpoints of theirs.
FISHER_TYPES = {"empirical": "labels", "sampled": "sampled"}
FISHER_DTYPES = ("float32", "bfloat16")
FISHER_PRIORS = ("input", "identity")
WEIGHT_UPDATES = ("joint", "independent", "none")


def is_number(value: object) -> bool:
    """Return whether a value is a real number, and no bool, which Python takes for one."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_type(name: str, value: object, kind: type | tuple[type, ...], advice: str) -> None:
    """Raise a CAPError that names an argument, unless its value is None or of a type, or one of several."""
    if value is not None and not isinstance(value, kind):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise CAPError(f"{name}={value!r:.80} is of type {type(value).__name__} and no {kinds}: {advice}")


@dataclass(frozen=True)
class CAPConfig:
    """How to prune, fixed once it is made; `dataclasses.replace` gives a changed one.

    The field names are the command line's.

    Raises:
        CAPError: a value is outside what its field allows.
    """

    method: str = field(
        default="cap",
        metadata={
            "help": "cap; or a baseline: obs (no correlations), sparsegpt (input Hessian), wanda (input norms), "
            "magnitude.",
            "choices": METHODS,
        },
    )
    allocation: str = field(
        default="global",
        metadata={"help": "global, uniform (the same sparsity in every target) or N:M, such as 2:4."},
    )
    pattern: str | None = field(
        default=None,
        metadata={
            "help": "Remove blocks of so many consecutive inputs of a row as a whole; int8 kernels multiply 1x4 at "
            "once. Default: single weights.",
            "choices": tuple(BLOCK_PATTERNS),
        },
    )
    selection: str = field(
        default="marginal",
        metadata={"help": "The loss that is compared between blocks along their paths.", "choices": SELECTIONS},
    )
    num_grads: int = field(default=512, metadata={"help": "Gradient samples that the Fisher is estimated from."})
    samples_per_grad: int = field(default=1, metadata={"help": "Examples whose mean gradient is one gradient sample."})
    fisher_block_size: str = field(
        default="auto",
        metadata={
            "help": "Weights a Fisher block: 'row', a number (fitted to each target's rows), or 'auto': the most that "
            "the memory and --max_passes allow, a row at most, and 192 where the elimination of more would take long."
        },
    )
    fisher_loss: str | None = field(
        default=None,
        metadata={
            "help": "The loss of the gradients: cross entropy with the data's labels, with labels sampled from the "
            "model, or the squared error of its features. Default: the first of these that model and data allow.",
            "choices": FISHER_LOSSES,
        },
    )
    feature_projections: int = field(
        default=1, metadata={"help": "Gradient samples per example of fisher_loss=features."}
    )
    class_weight: float = field(default=1.0, metadata={"help": "Weight of the class token in fisher_loss=features."})
    patch_weight: float = field(default=1.0, metadata={"help": "Weight of the patch tokens in fisher_loss=features."})
    pooled_weight: float = field(default=1.0, metadata={"help": "Weight of the pooled output in it."})
    fisher_dtype: str = field(
        default="float32",
        metadata={
            "help": "Gradients as they are, or rounded to bfloat16 before they are multiplied and sent.",
            "choices": FISHER_DTYPES,
        },
    )
    fisher_prior: str = field(
        default="input",
        metadata={
            "help": "What the Fisher of cap and obs is mixed with before the damp: the second moment of the layer's "
            "inputs, or nothing. The other methods have no prior.",
            "choices": FISHER_PRIORS,
        },
    )
    prior_strength: float = field(
        default=0.6,
        metadata={"help": "Share of the prior in the mixture, from 0 to below 1, for fisher_prior=input."},
    )
    damp: float | None = field(
        default=None,
        metadata={"help": "Added to the Fisher's diagonal, relative to its mean in the target. Default: by method."},
    )
    absolute_damp: bool = field(default=False, metadata={"help": "Take damp as it is, not relative to the diagonal."})
    weight_update: str = field(
        default="joint",
        metadata={
            "help": "How the kept weights move: the joint optimum, the sum of single OBS updates, or not at all.",
            "choices": WEIGHT_UPDATES,
        },
    )
    refit: bool | None = field(
        default=None,
        metadata={
            "help": "Refit the weights that pruning leaves, layer by layer, to what the dense model's layers make. "
            "Default: by method."
        },
    )
    refit_examples: int = field(
        default=256, metadata={"help": "Examples that layers are refitted to, all in memory at once; no labels needed."}
    )
    refit_ridge: float = field(
        default=0.2,
        metadata={
            "help": "How strongly a refit holds weights to the pruned ones, relative to the variance of their inputs."
        },
    )
    include: list[str] | None = field(
        default=None, metadata={"help": "Prune only targets whose name matches one of these patterns (fnmatch)."}
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "Leave out targets whose name matches one of these patterns (fnmatch)."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the example order and of sampled labels."})

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", METHODS),
            ("selection", SELECTIONS),
            ("fisher_loss", (None, *FISHER_LOSSES)),
            ("fisher_dtype", FISHER_DTYPES),
            ("fisher_prior", FISHER_PRIORS),
            ("weight_update", WEIGHT_UPDATES),
        ):
            if getattr(self, name) not in choices:
                raise CAPError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, choices))}")
        for name in ("num_grads", "samples_per_grad", "feature_projections", "refit_examples"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise CAPError(f"{name}={value!r} must be a whole number of at least 1")
        if self.fisher_block_size not in ("row", "auto"):
            # The command line and YAML hand over a string or an int; from here on it is an int.
            try:
                size = int(self.fisher_block_size)
            except (TypeError, ValueError):
                size = 0
            if size < 1:
                raise CAPError("fisher_block_size must be 'row', 'auto' or a whole number of at least 1")
            object.__setattr__(self, "fisher_block_size", size)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise CAPError(f"seed={self.seed!r} must be a whole number from 0 to 2^32 - 1")
        for name in ("damp", "class_weight", "patch_weight", "pooled_weight", "refit_ridge"):
            value = getattr(self, name)
            if not is_number(value) and not (name == "damp" and value is None):
                raise CAPError(f"{name}={value!r} must be a number")
        if self.damp is not None and not 0 < self.damp < float("inf"):
            raise CAPError(f"damp={self.damp!r} must be greater than 0 and finite")
        if not is_number(self.prior_strength) or not 0 <= self.prior_strength < 1:
            raise CAPError(f"prior_strength={self.prior_strength!r} must be a number from 0 to below 1")
        if self.refit is not None and not isinstance(self.refit, bool):
            raise CAPError(f"refit={self.refit!r} must be true, false or left out")
        if not 0 < self.refit_ridge < float("inf"):
            raise CAPError(f"refit_ridge={self.refit_ridge!r} must be greater than 0 and finite")
        weights = [getattr(self, f"{kind}_weight") for kind in ("class", "patch", "pooled")]
        if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise CAPError("class_weight, patch_weight and pooled_weight must be 0 or greater, and not all 0")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
            patterns = getattr(self, name)
            if patterns is not None and not (
                isinstance(patterns, list | tuple) and all(isinstance(each, str) for each in patterns)
            ):
                raise CAPError(f"{name}={patterns!r} must be a list of patterns, such as ['*.mlp.*']")
        _ = self.structure

    @property
    def num_examples(self) -> int:
        """Return how many calibration examples the gradient samples are made from, at most."""
        projections = self.feature_projections if self.fisher_loss == "features" else 1
        return self.num_grads * self.samples_per_grad // projections

    @property
    def structure(self) -> Pattern | None:
        """Return the rule that zeros keep to: N:M of `allocation`, blocks of `pattern`, or None."""
        nm = self.nm
        if self.pattern is None:
            return nm
        if not isinstance(self.pattern, str) or self.pattern not in BLOCK_PATTERNS:
            raise CAPError(f"pattern={self.pattern!r} is not one of {', '.join(BLOCK_PATTERNS)}")
        if nm is not None:
            raise CAPError(f"allocation={nm} has a pattern of its own: it does not go with pattern={self.pattern}")
        return BLOCK_PATTERNS[self.pattern]

    @property
    def nm(self) -> NMPattern | None:
        """Return the N:M pattern of `allocation`, or None for global and uniform."""
        if self.allocation in ("global", "uniform"):
            return None
        match = re.fullmatch(r"(\d+):(\d+)", str(self.allocation))
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise CAPError(f"allocation={self.allocation!r} is not global, uniform or N:M with 0 < N < M")
        return NMPattern(int(match[1]), int(match[2]))

    def check_sparsity(self, sparsity: float | None, total: int, zeros: int) -> float:
        """Return the sparsity to prune to: the one asked for, or an N:M pattern's.

        Args:
            sparsity: None for the pattern's.
            total: weights of all targets.
            zeros: of them that are 0 already, of units of several weights those in units that are 0 as a whole.

        Raises:
            CAPError: it is no number, out of range, below the model's, or not the pattern's.
        """
        if sparsity is not None and not is_number(sparsity):
            raise CAPError(
                f"sparsity {sparsity!r:.80} is of type {type(sparsity).__name__}: pass a number, such as 0.5"
            )
        if self.nm is not None:
            if sparsity is not None:
                self.nm.check_sparsity(sparsity)
            return self.nm.sparsity
        if sparsity is None or not 0 <= sparsity < 1:
            raise CAPError(f"sparsity {sparsity} is not in [0, 1)")
        if round(total * sparsity) < zeros:
            raise CAPError(f"the model is {zeros / total:.4%} sparse already: sparsity {sparsity} would be less")
        return sparsity

    def to_dict(self) -> dict:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "CAPConfig":
        """Return a config from fields, as `to_dict` gave them, now or in an earlier version.

        Raises:
            CAPError: a field is unknown, or its value is outside what it allows.
        """
        if not isinstance(values, Mapping):
            raise CAPError(f"{values!r:.80} holds no fields of CAPConfig: pass a dict of them")
        # Where there is no word of a prior or of a refit, there was none yet.
        values = {"fisher_prior": "identity", "refit": False, **values}
        if "fisher_type" in values:
            values["fisher_loss"] = FISHER_TYPES.get(values.pop("fisher_type"))
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise CAPError(f"CAPConfig has no field {', '.join(unknown)}")
        return cls(**values)

    def save(self, directory: str | Path) -> None:
        """Write `cap_config.json` into a folder."""
        (Path(directory) / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "CAPConfig":
        """Read `cap_config.json` from a folder."""
        return cls.from_dict(json.loads((Path(directory) / CONFIG_NAME).read_text()))
