"""Charts of layers: the map of the model, what removals cost, and which kinds of layers give up their weights."""

from collections.abc import Sequence
from typing import Any

from cap_hf.pages.chart import CATEGORY, PERCENT, QUIET, Chart, Spec, axis, colour, tip
from cap_hf.pages.facts import Curve, Layer
from cap_hf.pages.names import kinds_in_order, places_of
from cap_hf.pages.runs import Found
from cap_hf.pages.series import Model


def map_charts(found: Found) -> list[Chart]:
    """Return the maps of the model: how sparse each layer is, its share of the loss; of one checkpoint at a time."""
    models = [model for model in found.models if model.layers]
    if not models:
        return []
    values, rows = [], []
    for number, model in enumerate(models):
        layers = _squares(model.layers)
        values += [value | {"model": number} for value in layers]
        rows += [
            [model.name, value["layer"], f"{value['sparsity']:.2f}", _short(value["loss"]), value["zeros"]]
            for value in layers
        ]
    names = [model.name for model in models]
    header = ["checkpoint", "layer", "sparsity %", "loss", "weights that are 0"]
    kinds = kinds_in_order([value["kind"] for value in values])
    charts = [
        Chart(
            "sparsity-map",
            "How sparse each layer is",
            "Rows are kinds of layers, columns blocks from the first to the last.",
            _map_spec(values, kinds, "sparsity", "weights that are 0, %", {"scheme": "viridis", "domain": [0, 100]}),
            header,
            rows,
            names,
        )
    ]
    if any(value["loss"] is not None for value in values):
        text = "Share of the loss that the quadratic model expects of the pruning alone, before any refit or healing."
        scale = {"scheme": "magma", "zero": True}
        charts.append(
            Chart(
                "loss-map",
                "What pruning each layer costs",
                text,
                _map_spec(values, kinds, "part", "% of the loss", scale),
                choices=names,
            )
        )
    return charts


def _squares(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    losses = [layer.get("loss") for layer in layers]
    total = sum(loss for loss in losses if loss is not None)
    values = []
    for layer, place, loss in zip(layers, places_of([each.get("name", "") for each in layers]), losses, strict=True):
        weights, zeros = layer.get("num_weights", 0), layer.get("num_zeros", 0)
        values.append(
            {
                "layer": layer.get("name", ""),
                "depth": place.depth,
                "kind": place.kind,
                "sparsity": 100 * zeros / max(weights, 1),
                "zeros": zeros,
                "weights": weights,
                "loss": loss,
                "part": None if loss is None or not total else 100 * loss / total,
            }
        )
    return values


def _map_spec(values: list[dict], kinds: Sequence[str], name: str, title: str, scale: Spec) -> Spec:
    return {
        "params": [{"name": "choice", "value": 0}],
        "data": {"values": values},
        "transform": [{"filter": "datum.model == choice"}],
        "height": max(120, 30 * len(kinds)),
        "mark": {"type": "rect", "cornerRadius": 2, "stroke": "var(--back)", "strokeWidth": 1},
        "encoding": {
            "x": axis("depth", "block", "ordinal", axis={"labelAngle": 0, "grid": False}),
            "y": axis("kind", "", "nominal", sort=list(kinds), axis={"grid": False, "title": None}),
            "color": {
                "field": name,
                "type": "quantitative",
                "title": title,
                "scale": scale,
                "legend": {"orient": "bottom", "gradientLength": {"expr": "min(260, width - 20)"}, "format": ".3~g"},
            },
            "tooltip": tip(
                ("layer", "layer"),
                ("sparsity", "sparsity %", ".2f"),
                ("zeros", "weights that are 0", ","),
                ("weights", "weights", ","),
                ("loss", "loss", ".3g"),
                ("part", "% of the loss", ".2f"),
            ),
        },
    }


def curve_charts(curve: Curve | None, models: Sequence[Model]) -> list[Chart]:
    """Return what removals cost while more and more weights go, and from which kinds of layers they go.

    Args:
        curve: as a run has noted it down.
        models: of that run, whose sparsities are marked.
    """
    if not curve or not curve.get("sparsity"):
        return []
    marks = sorted({round(100 * model.sparsity, 4) for model in models})
    shares = [100 * value for value in curve["sparsity"]]
    points = [
        {"sparsity": share, "marginal": marginal, "total": total}
        for share, marginal, total in zip(shares, curve.get("marginal", []), curve.get("total", []), strict=False)
    ]
    header = ["sparsity %", "loss of the next removal", "loss of all so far"]
    rows = [[f"{each['sparsity']:.1f}", _short(each["marginal"]), _short(each["total"])] for each in points]
    text = "The cheapest removals of all layers go first; dashed lines are the checkpoints."
    charts = [
        Chart(
            "next-removal",
            "What the next removal costs",
            text,
            _curve_spec(points, "marginal", "loss", marks),
            header,
            rows,
        ),
        Chart(
            "total-loss",
            "What all removals so far cost",
            "The sum of the single removals' losses: an expectation, made before anything is refitted.",
            _curve_spec(points, "total", "loss", marks),
        ),
    ]
    layers = curve.get("layers") or {}
    if layers:
        kinds: dict[str, list[Sequence[float]]] = {}
        for (_, values), place in zip(layers.items(), places_of(list(layers)), strict=True):
            kinds.setdefault(place.kind, []).append(values)
        by_kind: list[dict[str, Any]] = [
            {"sparsity": share, "kind": kind, "own": 100 * sum(own[index] for own in each) / len(each)}
            for kind, each in kinds.items()
            for index, share in enumerate(shares)
            if all(index < len(own) for own in each)
        ]
        order = kinds_in_order(list(kinds))
        charts.append(
            Chart(
                "kinds",
                "Which layers give up their weights",
                "Mean sparsity of each kind of layer, by that of the model. Kinds below the diagonal are spared.",
                _kinds_spec(by_kind, order, marks),
            )
        )
    return charts


def _curve_spec(points: list[dict], name: str, title: str, marks: list[float]) -> Spec:
    x = axis("sparsity", "weights that are 0", scale={"domain": [0, 100]}, axis=PERCENT)
    y = axis(name, title, scale={"type": "log"}, axis={"format": ".0e"})
    return {
        "layer": [
            *_uprights(marks),
            {
                "data": {"values": [point for point in points if point[name] > 0]},
                "mark": {"type": "line", "color": CATEGORY[0], "point": {"size": 30, "opacity": 0}},
                "encoding": {
                    "x": x,
                    "y": y,
                    "tooltip": tip(("sparsity", "sparsity %", ".1f"), (name, title, ".3g")),
                },
            },
        ],
        "height": 260,
    }


def _kinds_spec(values: list[dict], kinds: Sequence[str], marks: list[float]) -> Spec:
    x = axis("sparsity", "weights of the model that are 0", scale={"domain": [0, 100]}, axis=PERCENT)
    y = axis("own", "of the layers", scale={"domain": [0, 100]}, axis=PERCENT)
    diagonal = {"data": {"values": [{"sparsity": 0, "own": 0}, {"sparsity": 100, "own": 100}]}}
    return {
        "layer": [
            *_uprights(marks),
            diagonal
            | {
                "mark": {"type": "line", "color": QUIET, "strokeDash": [2, 4], "strokeWidth": 1},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"values": values},
                "mark": {"type": "line"},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": colour("kind", scale={"domain": list(kinds)}),
                    "tooltip": tip(("kind", "kind"), ("sparsity", "model %", ".1f"), ("own", "these layers %", ".1f")),
                },
            },
        ],
        "height": 320,
    }


def _uprights(marks: list[float]) -> list[Spec]:
    return [
        {
            "data": {"values": [{"at": mark} for mark in marks]},
            "mark": {"type": "rule", "strokeDash": [4, 4], "color": QUIET, "opacity": 0.7},
            "encoding": {"x": {"field": "at", "type": "quantitative"}},
        }
    ]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
