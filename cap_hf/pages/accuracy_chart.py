"""The chart of accuracy against sparsity, of all ways in which models were made."""

from typing import Any

from cap_hf.checkpoints.metrics import Metric, measured_in
from cap_hf.hub.origin import RECOVERED
from cap_hf.pages.chart import MARK, PERCENT, QUIET, Chart, Spec, axis, colour, tip
from cap_hf.pages.runs import Found
from cap_hf.pages.series import Model

# Standard errors on either side that hold 95 % of a normal distribution.
WIDE = 1.96
# What searches go by, as reports call it.
SEARCHED = {"top1": "top1", "knn": "knn_top1", "cosine": "cosine"}


def all_metrics(found: Found) -> list[Metric]:
    """Return what was measured of any model."""
    return measured_in([*(origin.dense for origin in found.origins), *(model.metrics for model in found.models)])


def main_metric(found: Found) -> Metric | None:
    """Return what models are compared by: the first of the metrics whose drop matters, or else the first."""
    metrics = all_metrics(found)
    return next((metric for metric in metrics if metric.drop), metrics[0] if metrics else None)


def accuracy_chart(found: Found) -> Chart | None:
    """Return accuracy against sparsity: a line per way of making a model, its 95 % band, the dense line, the budget."""
    metric = main_metric(found)
    models = [model for model in found.models if metric and isinstance(model.metrics.get(metric.key), (int, float))]
    if metric is None or not models:
        return None
    scale, unit = (100, " %") if metric.share else (1, "")
    measured = [origin for origin in found.origins if metric.key in origin.dense]
    values = []
    for model in sorted(models, key=lambda model: model.sparsity):
        values.append(_point(model, metric, scale, model.dense.get(metric.key)))
        # A line begins at the dense model where that was measured.
        if any(model.origin is origin and not origin.sparsity for origin in measured) and model.made_by != RECOVERED:
            dense = model.origin.dense
            start = _point(Model("dense", model.series, 0.0, dense), metric, scale, dense[metric.key])
            values += [start] if start not in values else []
    x = axis("sparsity", "weights that are 0", scale={"zero": False, "nice": True}, axis=PERCENT)
    y = axis(
        "value", metric.name.removesuffix(" %"), scale={"zero": False}, axis={"labelExpr": f"datum.label + '{unit}'"}
    )
    by_series = colour("series")
    layers: list[Spec] = [
        {
            "mark": {"type": "area", "opacity": 0.16, "clip": True},
            "transform": [{"filter": "isValid(datum.low)"}],
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": by_series},
        },
        {
            # A single model has no band.
            "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.5},
            "transform": [{"filter": "isValid(datum.low) && datum.model != 'dense'"}],
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": by_series},
        },
        {"mark": {"type": "line"}, "encoding": {"x": x, "y": y, "color": by_series}},
        {
            "mark": {"type": "point", "size": 70, "filled": True, "opacity": 1},
            "transform": [{"filter": "datum.model != 'dense'"}],
            "encoding": {
                "x": x,
                "y": y,
                "color": by_series,
                "tooltip": tip(
                    ("model", "checkpoint"),
                    ("series", "made by"),
                    ("sparsity", "sparsity %", ".2f"),
                    ("value", metric.heading, ".4g"),
                    ("drop", "lost to the dense model", ".3g"),
                    ("error", "standard error", ".2g"),
                ),
            },
        },
    ]
    for origin in measured:
        layers += _level(", ".join(filter(None, ("dense", origin.label))), scale * origin.dense[metric.key], QUIET)
    budget = budget_of(found, metric)
    if budget is not None and len(measured) == 1:
        layers += _level(f"allowed: {scale * budget:.3g} less", scale * (measured[0].dense[metric.key] - budget), MARK)
    text = (
        "Bands are 95 % confidence intervals of a model's own figure; the drop against the dense model is known better."
    )
    rows = [
        [model.name, model.series, f"{100 * model.sparsity:.2f}", metric.show(model.metrics)]
        + ([metric.show_drop(model.metrics, model.dense)] if measured else [])
        for model in models
    ]
    header = ["checkpoint", "made by", "sparsity %", metric.heading] + (["drop"] if measured else [])
    title = f"{metric.name.removesuffix(' %').capitalize()} against sparsity"
    return Chart("accuracy", title, text, {"data": {"values": values}, "layer": layers, "height": 360}, header, rows)


def budget_of(found: Found, metric: Metric) -> float | None:
    """Return how far a metric was allowed to fall in the searches that went by it; None where they differ."""
    own = [each for each in found.searches.values() if SEARCHED.get(each.get("metric", "")) == metric.key]
    allowed = {each.get("max_drop") for each in own}
    return allowed.pop() if len(allowed) == 1 else None


def search_chart(found: Found) -> Chart | None:
    """Return what searches for a sparsity have measured: the drop of each model they tried, and what was allowed."""
    searches = [(run, each) for run, each in found.searches.items() if each.get("evaluations")]
    if not searches:
        return None
    values = []
    for run, search in searches:
        allowed = search.get("max_drop", 0.0)
        for number, each in enumerate(search["evaluations"], 1):
            drop, error = each.get("drop", 0.0), each.get("drop_se")
            value = {
                "run": run or "this run",
                "number": number,
                "sparsity": 100 * each.get("sparsity", 0.0),
                "drop": drop,
            }
            if error is not None:
                value |= {"error": error, "low": drop - WIDE * error, "high": drop + WIDE * error}
            values.append(value | {"result": "allowed" if drop <= allowed else "too much"})
    x = axis("sparsity", "weights that are 0", scale={"zero": False}, axis=PERCENT)
    y = axis("drop", f"drop of {searches[0][1].get('metric', 'the metric')}", scale={"zero": False})
    by = colour("result", scale={"domain": ["allowed", "too much"], "range": ["var(--c3)", MARK]})
    tips = tip(
        ("run", "run"),
        ("number", "tried as number"),
        ("sparsity", "sparsity %", ".2f"),
        ("drop", "drop", ".4f"),
        ("error", "standard error", ".4f"),
    )
    limits = dict.fromkeys(search.get("max_drop", 0.0) for _, search in searches)
    spec: Spec = {
        "data": {"values": values},
        "layer": [
            {
                "mark": "rule",
                "transform": [{"filter": "isValid(datum.low)"}],
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": by},
            },
            {"mark": {"type": "point", "size": 80}, "encoding": {"x": x, "y": y, "color": by, "tooltip": tips}},
            *(level for allowed in limits for level in _level("allowed", allowed, MARK)),
        ],
        "height": 260,
    }
    rows = [
        [each["run"], each["number"], f"{each['sparsity']:.2f}", f"{each['drop']:.4f}", each["result"]]
        for each in values
    ]
    text = "Drops against the dense model on held-out train images, with 95 % intervals."
    return Chart(
        "search", "The search for the sparsity", text, spec, ["run", "tried as", "sparsity %", "drop", "result"], rows
    )


def _point(model: Model, metric: Metric, scale: int, dense: float | None) -> dict[str, Any]:
    value, error = scale * model.metrics[metric.key], model.metrics.get(f"{metric.key}_se")
    point = {"sparsity": 100 * model.sparsity, "value": value, "series": model.series, "model": model.name}
    if error is not None:
        error *= scale
        point |= {"error": error, "low": value - WIDE * error, "high": value + WIDE * error}
    return point if dense is None else point | {"drop": scale * dense - value}


def _level(label: str, value: float, paint: str) -> list[Spec]:
    """Return a dashed line at a height, and what it is."""
    y = {"datum": value, "type": "quantitative"}
    rule = {"mark": {"type": "rule", "strokeDash": [5, 4], "color": paint}, "encoding": {"y": y}}
    mark = {"type": "text", "align": "right", "dx": -4, "dy": -7, "color": paint, "text": label}
    return [rule, {"data": {"values": [{}]}, "mark": mark, "encoding": {"x": {"value": "width"}, "y": y}}]
