"""The page: sections of charts, a table of the models, images, commands; one HTML file that needs nothing else."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from cap_hf.checkpoints.atomic import atomic_file
from cap_hf.checkpoints.metrics import Metric
from cap_hf.checkpoints.places import writing
from cap_hf.checkpoints.replacing import CHARTS, PAGE, PAGE_FOLDER
from cap_hf.errors import CAPError
from cap_hf.extras import need
from cap_hf.pages.accuracy_chart import accuracy_chart, all_metrics, main_metric, search_chart
from cap_hf.pages.chart import VERSION, Chart, on_paper
from cap_hf.pages.layer_charts import curve_charts, map_charts
from cap_hf.pages.origins import Origin
from cap_hf.pages.run_charts import seconds_chart, spectrum_chart, speed_charts, training_charts
from cap_hf.pages.runs import Found, find_runs
from cap_hf.pages.series import Model

# How a data URI of an image begins; anything else is not shown.
PNG = "data:image/png;base64,"
SCALE = 2.0


@dataclass
class Section:
    """A part of the page: a heading, and charts beside each other where there is room."""

    name: str
    title: str
    charts: list[Chart] = field(default_factory=list)

    @property
    def choices(self) -> list[str]:
        """Return what its charts let choose from, if any does."""
        return next((list(chart.choices) for chart in self.charts if chart.choices), [])


def write_page(folder: str | Path) -> Path:
    """Write the page of what was run into a folder, and a PNG file of each chart; return the page's path.

    Raises:
        CAPError: as `find_runs`; what draws charts is not installed; the files cannot be written.
    """
    folder = Path(folder)
    draw = need("vl_convert", "report")
    found = find_runs(folder)
    sections = sections_of(found)
    html = render(found, sections, draw.javascript_bundle(vl_version=VERSION))
    # Before the charts: what cannot be written leaves the earlier page and its charts as they were.
    with atomic_file(folder / PAGE) as path:
        # A name in a file may hold half of a pair of surrogates, which JSON allows and UTF-8 does not.
        path.write_text(html, encoding="utf-8", errors="replace")
    drawn = set()
    for chart in (chart for section in sections for chart in section.charts):
        png = draw.vegalite_to_png(on_paper(chart.whole()), vl_version=VERSION, scale=SCALE)
        drawn.add(chart.name)
        with atomic_file(folder / PAGE_FOLDER / f"{chart.name}.png") as path:
            path.write_bytes(png)
    with writing(folder):
        for name in set(CHARTS) - drawn:  # of an earlier page
            with suppress(FileNotFoundError):
                (folder / PAGE_FOLDER / f"{name}.png").unlink()
    return folder / PAGE


def sections_of(found: Found) -> list[Section]:
    """Return the sections of a page that have a chart; of several runs that noted something down, each has its own."""
    sections = [
        Section(
            "accuracy-section", "Accuracy", [each for each in (accuracy_chart(found), search_chart(found)) if each]
        ),
        Section("map-section", "Layers", map_charts(found)),
    ]
    # Charts of one name: those of the first run that has them.
    curve = next(((name, each["curve"]) for name, each in found.records.items() if each.get("curve")), None)
    if curve is not None:
        own = [model for model in found.models if model.run == curve[0] and not model.when]
        sections.append(Section("curve-section", "Elimination", curve_charts(curve[1], own)))
    spectra = next((each["spectra"] for each in found.records.values() if each.get("spectra")), [])
    chart = spectrum_chart(spectra)
    sections.append(Section("fisher-section", "Fisher", [chart] if chart else []))
    sections.append(Section("training-section", "Training", training_charts(found.histories)))
    sections += [Section(f"{each.name}-section", each.title, [each]) for each in speed_charts(found.benchmarks)]
    seconds = seconds_chart(found.phases)
    sections.append(Section("seconds-section", "Time and memory", [seconds] if seconds else []))
    return [section for section in sections if section.charts]


def render(found: Found, sections: list[Section], bundle: str) -> str:
    """Return the page. Everything that comes from a file is escaped.

    Args:
        found: what was run.
        sections: of charts.
        bundle: JavaScript that puts `vegaEmbed` into the window.
    """
    here = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    specs = {chart.name: chart.whole() for section in sections for chart in section.charts}
    return environment.from_string((here / "template.html").read_text(encoding="utf-8")).render(
        title=title_of(found),
        about=found.about,
        tiles=tiles_of(found),
        columns=columns_of(found),
        lines=lines_of(found),
        sections=sections,
        galleries=list(galleries_of(found)),
        commands=found.commands,
        notes=[*found.notes, *missing_from(found)],
        specs=specs,
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        script=Markup((here / "script.js").read_text(encoding="utf-8")),
        # It would end the element that it stands in.
        bundle=Markup(bundle.replace("</script", "<\\/script")),
    )


def title_of(found: Found) -> str:
    """Return what the page is about: the last part of the model's name, or the folder's where there are several."""
    name = str(found.about.get("model") or "").rstrip("/").rpartition("/")[2] if len(found.origins) == 1 else ""
    return name or found.folder.resolve().name


def tiles_of(found: Found) -> list[tuple[str, str, str]]:
    """Return the figures at the head of the page: what each is, the figure, and what it is of."""
    metric = main_metric(found)
    if metric is None:
        return []
    tiles = []
    for origin in found.origins:
        if metric.key in origin.dense:
            tiles.append((f"dense {metric.heading}", metric.show(origin.dense), origin.label or "before pruning"))
        for model in _best(found, metric, origin)[:3]:
            drop = metric.show_drop(model.metrics, model.dense)
            note = f"{drop} less than dense {origin.label}".strip() if drop != "-" else model.series
            tiles.append((f"{metric.heading} at {100 * model.sparsity:.4g} %", metric.show(model.metrics), note))
    return tiles


def _best(found: Found, metric: Metric, origin: Origin) -> list[Model]:
    """Return for each sparsity the model of an origin that keeps most, the sparsest first; none another run has left.

    Models of different origins are not compared.
    """
    best: dict[float, Model] = {}
    for model in found.models:
        value, place = model.metrics.get(metric.key), round(model.sparsity, 4)
        if value is None or model.when or model.origin is not origin:
            continue
        if place not in best or value > best[place].metrics[metric.key]:
            best[place] = model
    return [best[place] for place in sorted(best, reverse=True)]


def columns_of(found: Found) -> list[str]:
    """Return the headings of the table of models."""
    columns = ["checkpoint", "made by", "sparsity %"]
    for metric in all_metrics(found):
        columns += [metric.heading, "drop"] if _has_drop(found, metric) else [metric.heading]
    return columns


def _has_drop(found: Found, metric: Metric) -> bool:
    return metric.drop and any(origin.dense for origin in found.origins)


def lines_of(found: Found) -> list[list[str]]:
    """Return the lines of the table of models, the dense ones first."""
    every: list[tuple[str, str, float, dict, dict]] = [
        ("dense", origin.label, origin.sparsity or 0.0, origin.dense, origin.dense)
        for origin in found.origins
        if origin.dense
    ]
    every += [(model.name, model.series, model.sparsity, model.metrics, model.dense) for model in found.models]
    lines = []
    for name, series, sparsity, measured, dense in every:
        line = [name, series, f"{100 * sparsity:.2f}"]
        for metric in all_metrics(found):
            line.append(metric.show(measured, error=metric.drop))
            if _has_drop(found, metric):
                line.append(metric.show_drop(measured, dense))
        lines.append(line)
    return lines


def galleries_of(found: Found) -> Iterator[dict[str, Any]]:
    """Yield the images whose prediction has changed, by checkpoint.

    Raises:
        CAPError: what a run has noted down is not what it writes.
    """
    for run, record in found.records.items():
        for name, each in (record.get("changed") or {}).items():
            try:
                shown = [
                    {key: str(image[key]) for key in ("label", "dense", "sparse", "example")} | {"image": _png(image)}
                    for image in each["shown"]
                ]
                counts = {key: int(each[key]) for key in ("images", "changed", "lost", "won")}
            except (KeyError, TypeError, ValueError) as error:
                raise CAPError(
                    f"recorded.json holds no images as a run writes them ({error!r}): run it again"
                ) from error
            yield {"name": "/".join(filter(None, (run, name))), "shown": shown, **counts}


def _png(image: Mapping[str, Any]) -> str:
    """Return the data URI of an image, or nothing in its place if it is none."""
    uri = str(image["image"])
    return uri if uri.startswith(PNG) else ""


def missing_from(found: Found) -> list[str]:
    """Return what the page would have more, had the runs noted it down."""
    notes = []
    if found.models and not found.records:
        notes.append(
            "A run with --report true also notes down what removals cost, the spectrum of the Fisher, changed "
            "predictions and its command as typed."
        )
    for run, record in found.records.items():
        named = f"{run}: " if len(found.records) > 1 and run else ""
        notes += [f"{named}{line}" for line in record.get("absent", [])]
    several = [run or "this folder" for run, record in found.records.items() if record.get("curve")]
    if len(several) > 1:
        notes.append(f"Elimination and Fisher are those of {several[0]}; {', '.join(several[1:])}: a page of its own.")
    if not found.benchmarks:
        notes.append("Speed is here once cap-hf benchmark has written into a folder below this one.")
    return notes
