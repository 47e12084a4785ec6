"""What the models on a page were made from, and which runs began with the same: only these are compared.

Two runs began with the same model if its name, the data and the number of images agree, as far as their reports know
them, and what was measured of it does too, but for what another machine's rounding changes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any, cast

from cap_hf.checkpoints.metrics import METRICS, measured_in
from cap_hf.hub.origin import RECOVERED, kind_of
from cap_hf.pages.facts import Facts

# Two measurements of one model on different machines may differ by rounding: by this much, or this share.
TOLERANCE = 1e-4
# Where name, data and images are known to be the same: an image whose two best classes are nearly as likely may be
# right on one machine only. As many such images, or this share of a figure that is no accuracy, tell no models apart.
FEW_IMAGES, FEW_SHARE = 3, 0.01
ACCURACIES = frozenset(metric.key for metric in METRICS if metric.share)
COUNTS = frozenset({"num_examples", "bank_examples"})


@dataclass
class Origin:
    """A dense model, or a sparse one that was pruned further, and what it was measured on; None is not known.

    Attributes:
        model: its name.
        revision: of it, on the Hub.
        data: the dataset's name.
        subset: of the dataset.
        split: that it was measured on.
        images: how many of these.
        sparsity: share of the target weights that are 0.
        dense: what was measured of it; empty if nothing was.
        parent: name of the pruned model that a recovery without teacher began with.
        label: tells it from the others of a page; empty where there is no other.
    """

    model: str | None = None
    revision: str | None = None
    data: str | None = None
    subset: str | None = None
    split: str | None = None
    images: int | None = None
    sparsity: float | None = None
    dense: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    label: str = ""


def origin_of(facts: Facts, measured: Mapping[str, Any]) -> Origin:
    """Return what a run began with.

    Args:
        facts: its report.
        measured: of one of its models, for the number of images.
    """
    data, dense, name = facts.get("data") or {}, dict(facts.get("dense") or {}), facts.get("model_name_or_path")
    teacher, recovers = facts.get("teacher_model_name_or_path"), kind_of(facts) == RECOVERED
    return Origin(
        # What is recovered was pruned from another one, which may be its teacher.
        model=(teacher if recovers else teacher or name) or None,
        revision=None if recovers or teacher else facts.get("model_revision"),
        data=data.get("dataset_name"),
        subset=data.get("dataset_config_name"),
        split=data.get("eval_split_name"),
        images=cast("int | None", dense.get("num_examples") or measured.get("num_examples")),
        sparsity=facts.get("sparsity_dense") if dense else None,
        dense=dense,
        parent=name if recovers else None,
    )


def same_place(one: str, other: str) -> bool:
    """Return whether two names may be of one folder, or one model on the Hub: one of them may begin further up."""
    first, second = (PurePath(name.rstrip("/")).parts for name in (one, other))
    first, second = (tuple(part for part in parts if part not in (".", "..")) for parts in (first, second))
    absolute = [parts for parts in (first, second) if parts[:1] == ("/",)]
    if len(absolute) == 2:
        return first == second
    shorter = min(len(first), len(second))
    return bool(shorter) and first[-shorter:] == second[-shorter:]


def agree(one: Origin, other: Origin) -> bool:
    """Return whether two runs began with the same, as far as they know what that is."""
    for each in fields(Origin):
        first, second = getattr(one, each.name), getattr(other, each.name)
        if each.name in ("parent", "label") or first is None or second is None:
            continue
        if each.name in ("model", "data"):
            same = same_place(first, second)
        elif each.name == "dense":
            same = _same_figures(first, second, _images_of_both(one, other))
        else:
            same = first == second
        if not same:
            return False
    return True


def _images_of_both(one: Origin, other: Origin) -> int | None:
    """Return how many images two origins were measured on, if model, data, split and that are known to be the same."""
    for name in ("model", "data"):
        first, second = getattr(one, name), getattr(other, name)
        if first is None or second is None or not same_place(first, second):
            return None
    return one.images if (one.split, one.images) == (other.split, other.images) else None


def _same_figures(one: Mapping[str, Any], other: Mapping[str, Any], images: int | None) -> bool:
    """Return whether figures may be of one model: see `FEW_IMAGES` where the images are known, else `TOLERANCE`."""
    for key in one:
        first, second = one[key], other.get(key)
        if key.endswith("_se") or not (isinstance(first, (int, float)) and isinstance(second, (int, float))):
            continue
        if first == second or (math.isnan(first) and math.isnan(second)):
            continue
        within = TOLERANCE * max(1.0, abs(first), abs(second))
        if key in COUNTS:
            within = 0.0
        elif images and key in ACCURACIES:
            # A share of images is rounded in its last digits.
            within = max(within, FEW_IMAGES / images + 1e-9)
        elif images:
            within = max(within, FEW_SHARE * max(abs(first), abs(second)))
        if not (math.isfinite(first) and math.isfinite(second) and abs(first - second) <= within):
            return False
    return True


def group(origins: Sequence[Origin], parents: Sequence[int | None]) -> tuple[list[Origin], list[int]]:
    """Return the origins that differ, with their labels, and for each one that was given which of them it is.

    Args:
        origins: one for each run.
        parents: for each of them the number of the run whose model it went on from, where that is known.
    """
    found: list[Origin] = []
    places: list[int | None] = [None] * len(origins)
    # First those that know what they began with; then those that may have begun with one or another of them, by
    # themselves; then those that went on from one.
    named = [number for number, origin in enumerate(origins) if origin.model is not None]
    unsure = _unsure([origins[number] for number in named])
    sure = [number for place, number in enumerate(named) if place not in unsure]
    for number in sure:
        places[number] = _place(found, origins[number])
    for number in (named[place] for place in sorted(unsure)):
        # Equal ones that were measured are one.
        alike = [other for other in named if places[other] is not None and origins[other] == origins[number]]
        if alike and origins[number].dense:
            places[number] = places[alike[0]]
        else:
            found.append(replace(origins[number]))
            places[number] = len(found) - 1
    for number, origin in enumerate(origins):
        parent = parents[number]
        if origin.model is None and parent is not None:
            places[number] = places[parent]
    for number, origin in enumerate(origins):
        if places[number] is None:
            places[number] = _place(found, origin)
    _name(found)
    return found, [place or 0 for place in places]


def _unsure(origins: Sequence[Origin]) -> set[int]:
    """Return the places of the origins that agree with two which do not agree with each other."""
    count = len(origins)
    # Bit by bit the others that each one agrees with.
    fitting = [1 << place for place in range(count)]
    for one in range(count):
        for other in range(one):
            if agree(origins[one], origins[other]):
                fitting[one] |= 1 << other
                fitting[other] |= 1 << one
    return {
        one
        for one, each in enumerate(fitting)
        if any(each >> other & 1 and each & ~fitting[other] for other in range(count))
    }


def _place(found: list[Origin], origin: Origin) -> int:
    """Return the number of an origin among those that were found, to which it is added if it is none of them."""
    fitting = [number for number, each in enumerate(found) if agree(each, origin)]
    # Of several it would be a guess.
    if len(fitting) != 1:
        found.append(replace(origin, model=origin.model or origin.parent))
        return len(found) - 1
    known = found[fitting[0]]
    for each in fields(Origin):
        if getattr(known, each.name) in (None, {}):
            setattr(known, each.name, getattr(origin, each.name))
    return fitting[0]


def _name(origins: Sequence[Origin]) -> None:
    """Label each origin with what tells it from the others, in few words."""
    if len(origins) < 2:
        return
    words: list[list[str]] = [[] for _ in origins]
    for each, form in (
        ("model", "{}"),
        ("revision", "at {}"),
        ("data", "on {}"),
        ("subset", "{}"),
        ("split", "{}"),
        ("images", "{} images"),
        ("sparsity", "{:.0%} sparse"),
    ):
        values = [getattr(origin, each) for origin in origins]
        if each in ("model", "data"):
            values = _short(values)
        if len(set(values)) > 1:
            for own, value in zip(words, values, strict=True):
                own += [] if value is None else [form.format(value)]
    labels = [" ".join(own) for own in words]
    for place, origin in enumerate(origins):
        # Of one name with other figures: a model that was trained on in between.
        metric = next((each for each in measured_in([origin.dense]) if each.drop), None)
        if labels.count(" ".join(words[place])) > 1 and metric is not None:
            words[place].append(f"from {metric.show(origin.dense, error=False)}{' %' if metric.share else ''}")
    labels = [" ".join(own) for own in words]
    for number, (origin, label) in enumerate(zip(origins, labels, strict=True), 1):
        origin.label = label if label and labels.count(label) == 1 else f"{label} ({number})".strip()


def _short(names: Sequence[str | None]) -> list[str | None]:
    """Return names by as few of their last parts as tell them apart."""
    parts = [None if name is None else PurePath(name.rstrip("/")).parts for name in names]
    longest = max((len(each) for each in parts if each), default=1)
    for count in range(1, longest + 1):
        short = [None if each is None else "/".join(each[-count:]).replace("//", "/") for each in parts]
        if len(set(short)) == len({name for name in names if name is not None} | {None} & set(names)):
            return short
    return list(names)
