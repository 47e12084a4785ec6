"""One chart: a Vega-Lite specification, the table of its figures, and what all charts have in common."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
VERSION = "6.4"
# Colours by the names that style.css gives them for light and dark screens; here those of paper, for PNG files.
PAPER = {
    "--ink": "#1c2430",
    "--quiet": "#5b6673",
    "--line": "#dfe4ea",
    "--back": "#ffffff",
    "--mark": "#c2410c",
    "--c1": "#1f6fd0",
    "--c2": "#d9632b",
    "--c3": "#178a6b",
    "--c4": "#8b53c6",
    "--c5": "#b88600",
    "--c6": "#c23b73",
    "--c7": "#4c7a1e",
    "--c8": "#5f6f86",
}
CATEGORY = [f"var(--c{number})" for number in range(1, 9)]
INK, QUIET, LINE, MARK = "var(--ink)", "var(--quiet)", "var(--line)", "var(--mark)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

Spec = dict[str, Any]
Row = Sequence[Any]
# The axis of shares.
PERCENT: Spec = {"labelExpr": "datum.label + ' %'"}


@dataclass
class Chart:
    """A chart.

    Attributes:
        name: of its file and of its element.
        title: above it.
        text: below the title, in a sentence or two.
        spec: Vega-Lite, without what `whole` adds.
        header, rows: the figures as a table, for readers who do not see the chart.
        choices: of a list beside the chart: which numbers are shown, by the signal `choice`.
    """

    name: str
    title: str
    text: str
    spec: Spec
    header: Sequence[str] = ()
    rows: Sequence[Row] = ()
    choices: Sequence[str] = field(default_factory=list)

    def whole(self) -> Spec:
        """Return the specification as Vega-Lite takes it, in colours of the page's style."""
        return {
            "$schema": SCHEMA,
            "width": "container",
            "height": 300,
            "autosize": {"type": "fit-x", "contains": "padding"},
            "config": CONFIG,
            **clean(self.spec),
        }


CONFIG: Spec = {
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": QUIET,
        "titleColor": QUIET,
        "gridColor": LINE,
        "domainColor": LINE,
        "tickColor": LINE,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelPadding": 5,
        "labelOverlap": True,
    },
    "axisQuantitative": {"tickCount": {"expr": "width < 420 ? 4 : 7"}},
    "legend": {
        "labelColor": INK,
        "titleColor": QUIET,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "bottom",
        "labelLimit": 220,
        "symbolOpacity": 1,
        # Two legends below each other: on a phone there is no room beside one.
        "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
        "symbolSize": 80,
        "columns": {"expr": "width < 420 ? 2 : width < 700 ? 3 : 5"},
    },
    "range": {"category": CATEGORY},
    "line": {"strokeWidth": 2},
    "point": {"size": 60, "filled": True},
    "text": {"color": QUIET, "fontSize": 12},
    "rule": {"color": QUIET},
    "header": {"labelColor": QUIET, "titleColor": QUIET},
}


def tip(*fields: tuple[str, str] | tuple[str, str, str]) -> list[Spec]:
    """Return what a hover tells: fields with their titles, and of numbers their format."""
    found = []
    for name, title, *form in fields:
        found.append({"field": name, "title": title} | ({"format": form[0], "type": "quantitative"} if form else {}))
    return found


def axis(name: str, title: str, kind: str = "quantitative", **more: Any) -> Spec:
    """Return the encoding of a field along an axis."""
    return {"field": name, "type": kind, "title": title, **more}


def colour(name: str, title: str | None = None, **more: Any) -> Spec:
    """Return the encoding of a field by the colours of categories, in the order of the data."""
    return {"field": name, "type": "nominal", "title": title, "sort": None, **more}


def clean(value: Any) -> Any:
    """Return a value with None for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: clean(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def on_paper(spec: Spec, width: int = 720) -> Spec:
    """Return a specification with the colours and the width of a PNG file."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, str) and value.startswith("var(") and value[4:-1] in PAPER:
            return PAPER[value[4:-1]]
        return value

    # A width of "container" is that of an element.
    return plain(spec) | {"width": width, "background": "#ffffff", "padding": 16}
