"""The models of a page, and which of them are points of one line: made in the same way, from the same, by one run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from cap_hf.hub.origin import GRADUAL, HEALING, PRUNED, kind_of, single_values, steps_of
from cap_hf.pages.facts import Facts, Layer, Pruning, Result
from cap_hf.pages.origins import Origin


@dataclass
class Model:
    """A model that was made.

    Attributes:
        name: of its folder, as seen from the page's.
        series: how it was made, such as "cap" or "recovered", and what else tells it from other lines.
        sparsity: share of the target weights that are 0.
        metrics: what was measured of it; empty if nothing was.
        layers: of it, as its report has them.
        dense: what its own run measured of the dense model.
        made_by: as `kind_of` has it.
        origin: what it was made from.
        settings: all that says how it was made, as text.
        run: the name of the folder whose report tells of it.
        when: "" of a model that its run tells of; of one that another run has left in a run's folder "an earlier run",
            "a later run" or, where their reports do not say when they began, "another run".
    """

    name: str
    series: str
    sparsity: float
    metrics: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    dense: dict[str, Any] = field(default_factory=dict)
    made_by: str = PRUNED
    origin: Origin = field(default_factory=Origin)
    settings: str = ""
    run: str = ""
    when: str = ""


def series_of(facts: Facts, result: Result) -> str:
    """Return in a few words how a model was made.

    Args:
        facts: the report of its run.
        result: what that says of the model.
    """
    kind = kind_of(facts)
    if kind != PRUNED:
        return "pruned while training" if kind == GRADUAL else "recovered"
    pruning = result.get("pruning") or cast(Pruning, {})
    words = [pruning.get("method", "pruned"), pruning.get("pattern") or ""]
    words.append(pruning["allocation"] if pruning.get("allocation", "global") != "global" else "")
    steps = len(steps_of({"steps": result.get("steps")}))
    words.append(f"in {steps} steps" if steps else "")
    series = " ".join(word for word in words if word)
    return f"{series}, healed" if result.get("healing") else series


def settings_of(facts: Facts, result: Result) -> str:
    """Return all settings that a model was made with, as one text: those of its pruning, healing and training."""
    healing = result.get("healing") or {}
    pruning, data = result.get("pruning") or cast(Pruning, {}), facts.get("data") or {}
    settings = {
        "config": facts.get("config"),
        "refit": bool(pruning.get("refit")),
        "healing": {name: healing.get(name) for name in HEALING} if healing else None,
        "training": single_values(dict(facts.get("training_arguments") or {})),
        "examples": [cast(dict, data).get(name) for name in ("train_split_name", "max_train_samples")],
    }
    return json.dumps(settings, sort_keys=True, default=str)


def tell_apart(models: Sequence[Model]) -> None:
    """Make the series of models that are no points of one line differ.

    Those of different origins get its label, what another run has left gets when, and where there are several settings
    or several models of one sparsity, their folders tell them apart.
    """
    for model in models:
        model.series += f", {model.origin.label}" if model.origin.label else ""
        model.series += f", {model.when}" if model.when else ""
    for alike in _by(models, lambda model: model.series):
        if _one_line(alike):
            continue
        by_folder = _by(alike, _folder)
        whole = len(by_folder) > 1 and all(map(_one_line, by_folder))
        for model in alike:
            model.series += f" ({_folder(model) if whole else model.name})"


def _by(models: Sequence[Model], key: Callable[[Model], str]) -> list[list[Model]]:
    found: dict[str, list[Model]] = {}
    for model in models:
        found.setdefault(key(model), []).append(model)
    return list(found.values())


def _folder(model: Model) -> str:
    return model.name.rpartition("/")[0] or "."


def _one_line(models: Sequence[Model]) -> bool:
    """Return whether models have one setting, and no two of them one sparsity."""
    sparsities = {round(model.sparsity, 6) for model in models}
    return len({model.settings for model in models}) == 1 and len(sparsities) == len(models)
