"""Charts of how a run went: the spectrum of its Fisher, training, speed, seconds of each phase."""

from collections.abc import Mapping, Sequence
from typing import Any

from cap_hf.errors import CAPError
from cap_hf.pages.chart import CATEGORY, QUIET, Chart, Spec, axis, colour, tip
from cap_hf.pages.facts import Benchmark, Phase
from cap_hf.pages.names import places_of

# What a log of the Trainer holds, by chart: its name, title, and the keys of the entries with what each is called.
LOGGED: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("training-loss", "Loss while training", {"loss": "train", "eval_loss": "evaluation"}),
    (
        "training-accuracy",
        "Accuracy while training",
        {"eval_top1": "top-1", "eval_top5": "top-5", "eval_accuracy": "accuracy"},
    ),
    ("learning-rate", "Learning rate", {"learning_rate": "learning rate"}),
    ("training-sparsity", "Sparsity while training", {"sparsity": "sparsity"}),
)
SHARES = ("training-accuracy", "training-sparsity")


def spectrum_chart(spectra: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Return the eigenvalues of the Fisher of a few layers, each against its rank, relative to the largest one.

    Raises:
        CAPError: what a run has noted down is not what it writes.
    """
    values, rows = [], []
    try:
        names = [str(each["name"]) for each in spectra]
        places = places_of(names)
        for each, place, name in zip(spectra, places, names, strict=True):
            for kind, found in each["kinds"].items():
                top = max(found["values"], default=0.0)
                for rank, value in zip(found["ranks"], found["values"], strict=True):
                    if value > 1e-12 * top:
                        layer = f"{place.kind} of block {place.depth}"
                        values.append(
                            {
                                "name": name,
                                "layer": layer,
                                "of": kind,
                                "rank": rank,
                                "part": value / top,
                                "value": value,
                            }
                        )
            rows.append([name, each["size"], each["weights"], each["samples"], f"{each['damp']:.2e}"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CAPError(f"recorded.json tells of no spectrum that a run writes ({error!r}): run it again") from error
    if not values:
        return None
    spec = {
        "data": {"values": values},
        "mark": {"type": "line", "point": {"size": 40, "opacity": 0}, "strokeWidth": 1.5},
        "encoding": {
            "x": axis("rank", "rank of the eigenvalue", scale={"type": "log"}, axis={"tickCount": 5}),
            "y": axis("part", "of the largest one", scale={"type": "log"}, axis={"format": ".0e", "tickCount": 6}),
            "color": colour("layer"),
            "strokeDash": {
                "field": "of",
                "type": "nominal",
                "title": None,
                "sort": ["with prior", "gradients"],
                "legend": {"symbolType": "stroke", "symbolSize": 300},
            },
            "tooltip": tip(("name", "layer"), ("of", "Fisher"), ("rank", "rank", ","), ("value", "eigenvalue", ".3g")),
        },
        "height": 320,
    }
    text = (
        "Eigenvalues of the first block of a few layers. Gradients alone span as many directions as there are samples; "
        "where a prior is mixed in, it says what lies beyond."
    )
    return Chart(
        "spectrum",
        "Spectrum of the Fisher",
        text,
        spec,
        ["layer", "block size", "weights looked at", "samples", "damp"],
        rows,
    )


def training_charts(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """Return what the logs of trainings hold, over the optimizer's steps: loss, accuracy, learning rate, sparsity."""
    charts = []
    for name, title, keys in LOGGED:
        scale = 100 if name in SHARES else 1
        values = [
            {"step": entry["step"], "value": scale * entry[key], "what": what, "run": run or "this run"}
            for run, history in histories.items()
            for entry in history
            for key, what in keys.items()
            if all(isinstance(entry.get(each), (int, float)) for each in (key, "step"))
        ]
        if not values:
            continue
        runs, kinds = (list(dict.fromkeys(value[each] for value in values)) for each in ("run", "what"))
        by = "run" if len(runs) > 1 else "what"
        unit = " %" if scale == 100 else ""
        step = name == "training-sparsity"
        spec: Spec = {
            "data": {"values": values},
            "mark": {"type": "line", "point": {"size": 24}, **({"interpolate": "step-after"} if step else {})},
            "encoding": {
                "x": axis("step", "step", axis={"format": ",d", "tickMinStep": 1}),
                "y": axis("value", title.lower(), scale={"zero": step}, axis={"labelExpr": f"datum.label + '{unit}'"}),
                "color": colour(by, legend=None) if len(runs) == len(kinds) == 1 else colour(by),
                "tooltip": tip(
                    ("run", "run"), ("what", "figure"), ("step", "step", ","), ("value", title.lower(), ".4g")
                ),
            },
            "height": 220,
        }
        if len(runs) > 1 and len(kinds) > 1:
            spec["encoding"]["strokeDash"] = {"field": "what", "type": "nominal", "title": None, "sort": None}
        rows = [[value["run"], value["what"], value["step"], f"{value['value']:.4g}"] for value in values]
        charts.append(Chart(name, title, "", spec, ["run", "figure", "step", "value"], rows))
    return charts


def speed_charts(benchmarks: Mapping[str, Benchmark], dense_name: str = "dense") -> list[Chart]:
    """Return images per second of every backend, and where several sparsities were measured the speedup against them.

    Raises:
        CAPError: a benchmark holds no measurement as `cap-hf benchmark` writes it.
    """
    values = []
    try:
        for place, benchmark in benchmarks.items():
            for each in benchmark.get("measurements", []):
                size, threads, seconds = each["batch_size"], each["threads"], each["seconds"]
                values.append(
                    {
                        "run": place or "this folder",
                        "sparsity": 100 * benchmark.get("sparsity", 0.0),
                        "backend": str(each["backend"]),
                        "setting": f"batch {size}, {threads} thread{'s' if threads > 1 else ''}",
                        "milliseconds": 1000 * seconds,
                        "rate": size / seconds,
                        "low": size / each["high_seconds"],
                        "high": size / each["low_seconds"],
                        "speedup": each["speedup"],
                    }
                )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CAPError(f"benchmark.json holds no measurements of cap-hf benchmark ({error!r}): run it again") from error
    if not values:
        return []
    for value in values:
        value["group"] = f"{value['run']}: {value['setting']}" if len(benchmarks) > 1 else value["setting"]
    groups = list(dict.fromkeys(value["group"] for value in values))
    values = [value | {"group_number": groups.index(value["group"])} for value in values]
    backends = list(dict.fromkeys(value["backend"] for value in values))
    tips = tip(
        ("backend", "backend"),
        ("group", "measured"),
        ("sparsity", "sparsity %", ".1f"),
        ("rate", "images per second", ".1f"),
        ("milliseconds", "ms per batch", ".2f"),
        ("speedup", "times dense", ".2f"),
    )
    y = axis("backend", "", "nominal", sort=backends, axis={"title": None, "grid": False, "labelLimit": 130})
    charts = [
        Chart(
            "rate",
            "Images per second",
            "Medians, with quartiles as thin lines.",
            {
                "params": [{"name": "choice", "value": 0}],
                "data": {"values": values},
                "transform": [{"filter": "datum.group_number == choice"}],
                "height": 26 * len(backends) + 10,
                "layer": [
                    {
                        "mark": {"type": "bar", "cornerRadiusEnd": 3},
                        "encoding": {
                            "y": y,
                            "x": axis("rate", "images per second"),
                            "color": {
                                "condition": {"test": "indexof(datum.backend, 'sparse') == 0", "value": CATEGORY[1]},
                                "value": CATEGORY[0],
                            },
                            "tooltip": tips,
                        },
                    },
                    {
                        "mark": {"type": "rule", "color": "var(--ink)"},
                        "encoding": {"y": y, "x": axis("low", "images per second"), "x2": {"field": "high"}},
                    },
                ],
            },
            ["backend", "measured", "sparsity %", "images/s", "ms", "times dense"],
            [
                [
                    each["backend"],
                    each["group"],
                    f"{each['sparsity']:.1f}",
                    f"{each['rate']:.1f}",
                    f"{each['milliseconds']:.2f}",
                    f"{each['speedup']:.2f}",
                ]
                for each in values
            ],
            groups,
        )
    ]
    if len({round(value["sparsity"], 3) for value in values}) > 1:
        x = axis("sparsity", "weights that are 0", scale={"zero": False}, axis={"labelExpr": "datum.label + ' %'"})
        settings = list(dict.fromkeys(value["setting"] for value in values))
        values = [
            value | {"setting_number": settings.index(value["setting"])}
            for value in values
            if value["backend"] != dense_name
        ]
        line = {"type": "line", "point": {"size": 60}}
        encoding = {"x": x, "y": axis("speedup", "times as fast as dense"), "color": colour("backend"), "tooltip": tips}
        spec = {
            "params": [{"name": "choice", "value": 0}],
            "layer": [
                {
                    "data": {"values": values},
                    "transform": [{"filter": "datum.setting_number == choice"}],
                    "mark": line,
                    "encoding": encoding,
                },
                {
                    "mark": {"type": "rule", "strokeDash": [5, 4], "color": QUIET},
                    "encoding": {"y": {"datum": 1, "type": "quantitative"}},
                },
            ],
            "height": 280,
        }
        charts.append(
            Chart(
                "speedup",
                "Speed against sparsity",
                "Times as fast as the dense model in PyTorch, measured beside it.",
                spec,
                choices=settings,
            )
        )
    return charts


def seconds_chart(phases: Mapping[str, Sequence[Phase]]) -> Chart | None:
    """Return how long each phase of the runs took, in the order of the work, and its peak memory."""
    values = []
    for run, records in phases.items():
        for place, record in enumerate(records):
            peaks = record.get("peak_memory_bytes", {})
            name = record.get("phase", "")
            values.append(
                {
                    "run": run or "this folder",
                    "phase": f"{run}: {name}" if run and len(phases) > 1 else name,
                    "place": place,
                    "seconds": record.get("seconds", 0.0),
                    "memory": ", ".join(f"{size / 2**30:.2f} GiB ({kind})" for kind, size in peaks.items()),
                }
            )
    if not values:
        return None
    order = list(dict.fromkeys(value["phase"] for value in values))
    spec = {
        "data": {"values": values},
        "mark": {"type": "bar", "cornerRadiusEnd": 3, "color": CATEGORY[0]},
        "height": 24 * len(order) + 10,
        "encoding": {
            "y": axis("phase", "", "nominal", sort=order, axis={"title": None, "grid": False, "labelLimit": 170}),
            "x": axis("seconds", "seconds", axis={"format": ",.6~g"}),
            "tooltip": tip(
                ("run", "run"), ("phase", "phase"), ("seconds", "seconds", ",.1f"), ("memory", "peak memory")
            ),
        },
    }
    rows = [[value["phase"], f"{value['seconds']:.1f}", value["memory"]] for value in values]
    return Chart(
        "seconds",
        "Time of each phase",
        "A hover also tells the peak memory.",
        spec,
        ["phase", "seconds", "peak memory"],
        rows,
    )
