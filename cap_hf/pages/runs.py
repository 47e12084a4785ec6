"""What was run into a folder: reports, benchmarks and logs that lie in it, read into one list of models and of runs.

Nothing of it is believed: what is used of a file has the type that it is used as, or an error names the file.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cap_hf.checkpoints.folder import REPORT_NAME, Report, check_types, read_json
from cap_hf.checkpoints.replacing import PAGE_FOLDER, RECORD
from cap_hf.errors import CAPError
from cap_hf.hub.origin import GRADUAL, PRUNED, command_line, kind_of, run_of, steps_of
from cap_hf.pages.facts import Benchmark, Facts, Layer, Phase, Pruning, Record, Result, Search

RECORD_FOLDER, RECORD_NAME = PAGE_FOLDER, RECORD
BENCHMARK_NAME, STATE_NAME = "benchmark.json", "trainer_state.json"
# How far below the folder is looked, and at how many files at most.
DEPTH, MOST_FILES = 4, 1000


@dataclass
class Model:
    """A model that was made.

    Attributes:
        name: of its folder, as seen from the page's.
        series: how it was made, such as "cap" or "recovered".
        sparsity: share of the target weights that are 0.
        metrics: what was measured of it; empty if nothing was.
        layers: of it, as its report has them.
        dense: what its own run measured of the dense model.
    """

    name: str
    series: str
    sparsity: float
    metrics: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    dense: dict[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """All that was run into a folder, in the order of the names of what holds it.

    Attributes:
        models: that were made.
        dense: what was measured of the dense model, by the first report that says so.
        sparsity_dense: share of its target weights that are 0.
        about: the model, data, device and versions of the first report.
        denses: what each run measured of its dense model and how sparse that was, by the name of its folder.
        phases, histories, benchmarks, records, searches: of each run, by the name of its folder.
        commands: the folder of a run, the command, and whether it is as it was typed.
        notes: what is there and was not used, and why.
    """

    folder: Path
    models: list[Model] = field(default_factory=list)
    dense: dict[str, Any] = field(default_factory=dict)
    sparsity_dense: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    denses: dict[str, tuple[dict[str, Any], float]] = field(default_factory=dict)
    phases: dict[str, list[Phase]] = field(default_factory=dict)
    histories: dict[str, list[dict]] = field(default_factory=dict)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    searches: dict[str, Search] = field(default_factory=dict)
    commands: list[tuple[str, str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agreed(self) -> bool:
        """Return whether the dense models of all runs are the same as far as figures are shown."""
        return len({str(_rounded(each)) for each in self.denses.values()}) < 2


def find_runs(folder: str | Path) -> Found:
    """Return what was run into a folder, and into those below it.

    Raises:
        CAPError: nothing was, a file cannot be read, or holds what no run writes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CAPError(f"{folder} is no folder: name the --output_dir of a run")
    found, told = Found(folder), set[Path]()
    for path in list(files_of(folder)):
        name = "" if path.parent == folder else path.parent.relative_to(folder).as_posix()
        if path.name == REPORT_NAME and path.parent not in told:
            told |= _read_report(found, path, name)
        elif path.name == BENCHMARK_NAME:
            content = read_json(path)
            check_types(content, Benchmark, path)
            found.benchmarks[name] = cast(Benchmark, content)
        elif path.name == STATE_NAME and name.rpartition("/")[0] not in found.histories:
            # Of a training that has not ended, or was not told to say more.
            content = read_json(path)
            check_types(content, Facts, path)
            found.histories[name] = content.get("log_history") or []
    if not (found.models or found.benchmarks or found.histories):
        raise CAPError(
            f"{folder} holds no {REPORT_NAME}, {BENCHMARK_NAME} or {STATE_NAME} of a run: name the --output_dir of one"
        )
    _tell_apart(found.models)
    if not found.agreed:
        found.notes.append("The runs measured different figures of their dense models: each drop is against its own.")
    return found


def _rounded(dense: tuple[dict[str, Any], float]) -> list[tuple[str, float]]:
    return sorted((key, round(value, 4)) for key, value in dense[0].items() if isinstance(value, (int, float)))


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files that a page is made from, those of a folder before those below it; links are not followed."""
    count = 0
    for root, folders, files in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        # One that begins with a dot may be half written.
        folders[:] = sorted(each for each in folders if depth < DEPTH and each != PAGE_FOLDER and each[0] != ".")
        for name in (REPORT_NAME, BENCHMARK_NAME, STATE_NAME):
            if name in files:
                count += 1
                if count > MOST_FILES:
                    raise CAPError(f"{folder} holds more than {MOST_FILES} reports: name a folder further down")
                yield Path(root) / name


def _read_report(found: Found, path: Path, name: str) -> set[Path]:
    """Add what a report says; return the folders of checkpoints that it tells of as well."""
    content = read_json(path)
    check_types(content, Facts, path)
    facts, told = cast(Facts, content), set()
    results = content.get("results")
    if results is None:
        results = [{**content, "checkpoint": ""}]
    elif isinstance(results, dict):  # of the demo, by method and sparsity
        results = [{**each, "checkpoint": key} for key, each in results.items() if isinstance(each, dict)]
    check_types(results, list[Result], f"{path}: results")
    kind = kind_of(facts)
    for result in cast(list[Result], results):
        told.add(path.parent / result.get("checkpoint", ""))
        pruning = result.get("pruning") or cast(Pruning, {})
        layers = pruning.get("layers") or facts.get("layers") or []
        check_types(layers, list[Layer], f"{path}: layers")
        sparsity = pruning.get("sparsity") if kind == PRUNED else facts.get("sparsity")
        if sparsity is None:
            continue
        metrics = (result.get("sparse") if kind == PRUNED else None) or result.get("recovered") or {}
        label = "/".join(each for each in (name, result.get("checkpoint", "")) if each) or found.folder.name
        model = Model(label, _series(kind, result), sparsity, dict(metrics), cast(list[Layer], layers))
        model.dense = dict(facts.get("dense") or {})
        found.models.append(model)
    if facts.get("dense"):
        found.denses[name] = dict(facts["dense"] or {}), facts.get("sparsity_dense") or 0.0
    found.dense = found.dense or dict(facts.get("dense") or {})
    found.sparsity_dense = found.sparsity_dense or facts.get("sparsity_dense") or 0.0
    found.about = found.about or _about(facts)
    search = facts.get("search")
    if search:
        found.searches[name] = search
    if facts.get("phases"):
        found.phases[name] = facts["phases"] or []
    if facts.get("log_history"):
        found.histories[name] = facts["log_history"] or []
    record = _read_record(found, path, name)
    _note_command(found, name, facts, results, record)
    return told - {path.parent}


def _series(kind: str, result: Result) -> str:
    """Return in a few words how a model was made."""
    if kind != PRUNED:
        return "pruned while training" if kind == GRADUAL else "recovered"
    pruning = result.get("pruning") or cast(Pruning, {})
    words = [pruning.get("method", "pruned"), pruning.get("pattern") or ""]
    words.append(pruning["allocation"] if pruning.get("allocation", "global") != "global" else "")
    steps = len(steps_of({"steps": result.get("steps")}))
    words.append(f"in {steps} steps" if steps else "")
    series = " ".join(word for word in words if word)
    return f"{series}, healed" if result.get("healing") else series


def _tell_apart(models: list[Model]) -> None:
    """Name the folder in the series of models where others of the same sparsity were made in the same way."""
    alike: dict[tuple[str, float], list[str]] = {}
    for model in models:
        alike.setdefault((model.series, round(model.sparsity, 6)), []).append(model.name)
    twice = {series: names for (series, _), names in alike.items() if len(names) > 1}
    for model in models:
        names = twice.get(model.series, [])
        parents = {name.rpartition("/")[0] for name in names}
        if names:
            model.series += f" ({(model.name.rpartition('/')[0] or '.') if len(parents) > 1 else model.name})"


def _about(facts: Facts) -> dict[str, Any]:
    data = facts.get("data") or {}
    about = {
        "model": facts.get("teacher_model_name_or_path") or facts.get("model_name_or_path"),
        "data": data.get("dataset_name"),
        "split": data.get("eval_split_name"),
        "processes": facts.get("num_processes"),
        "device": cast(dict, facts).get("device"),
        "seed": facts.get("seed"),
        "versions": facts.get("versions"),
    }
    return {key: value for key, value in about.items() if value is not None}


def _read_record(found: Found, path: Path, name: str) -> Record:
    """Return what the run of a report has noted down, or nothing: what another run noted down is no part of it."""
    place = path.parent / RECORD_FOLDER / RECORD_NAME
    if not place.is_file():
        return {}
    content = read_json(place)
    check_types(content, Record, place)
    if content.get("report_sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        found.notes.append(f"{place.relative_to(found.folder)} is of another run than {REPORT_NAME} and was left out.")
        return {}
    found.records[name] = cast(Record, content)
    return found.records[name]


def _note_command(found: Found, name: str, facts: Facts, results: list, record: Record) -> None:
    typed = record.get("command")
    if typed:
        found.commands.append((name, typed, True))
        return
    config = facts.get("config") or {}
    for result in cast(list[Result], results):
        pruning = result.get("pruning")
        whole = cast(Report, {**facts, **({"pruning": pruning, "steps": result.get("steps")} if pruning else {})})
        if result.get("healing"):
            whole["healing"] = cast(Any, result["healing"])
        asked = pruning.get("requested_sparsity") or pruning.get("sparsity", 0.0) if pruning else None
        sparsity = facts.get("sparsity") or 0.0 if asked is None else asked
        command = command_line(kind_of(facts), run_of(whole), config, sparsity)
        if command:
            found.commands.append(("/".join(filter(None, (name, result.get("checkpoint", "")))), command, False))
