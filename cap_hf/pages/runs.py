"""What was run into a folder: reports, benchmarks and logs that lie in it, read into one list of models and of runs.

Nothing of it is believed: what is used of a file has the type that it is used as, or an error names the file.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cap_hf.checkpoints.folder import REPORT_NAME, Report, check_types, read_json
from cap_hf.checkpoints.replacing import PAGE_FOLDER, RECORD
from cap_hf.errors import CAPError
from cap_hf.hub.origin import PRUNED, command_line, kind_of, run_of
from cap_hf.pages.belonging import Run, sort_out
from cap_hf.pages.facts import Benchmark, Facts, Layer, Phase, Pruning, Record, Result, Search
from cap_hf.pages.origins import Origin, group, origin_of, same_place
from cap_hf.pages.series import Model, series_of, settings_of, tell_apart

RECORD_FOLDER, RECORD_NAME = PAGE_FOLDER, RECORD
BENCHMARK_NAME, STATE_NAME = "benchmark.json", "trainer_state.json"
# How far below the folder is looked, and at how many files at most.
DEPTH, MOST_FILES = 4, 1000


@dataclass
class Found:
    """All that was run into a folder, in the order of the names of what holds it.

    Attributes:
        models: that were made.
        origins: what they were made from; several are not to be compared with each other.
        about: the models, data, devices and versions of the reports.
        phases, histories, benchmarks, records, searches: of each run, by the name of its folder.
        commands: the folder of a run, the command, and whether it is as it was typed.
        notes: what is there and was not used, and why.
    """

    folder: Path
    models: list[Model] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, list[Phase]] = field(default_factory=dict)
    histories: dict[str, list[dict]] = field(default_factory=dict)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    searches: dict[str, Search] = field(default_factory=dict)
    commands: list[tuple[str, str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_runs(folder: str | Path) -> Found:
    """Return what was run into a folder, and into those below it.

    Raises:
        CAPError: nothing was, a file cannot be read, or holds what no run writes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CAPError(f"{folder} is no folder: name the --output_dir of a run")
    found, runs = Found(folder), []
    for path in list(files_of(folder)):
        name = "" if path.parent == folder else path.parent.relative_to(folder).as_posix()
        if path.name == REPORT_NAME:
            runs.append(_read_report(path, name))
        elif path.name == BENCHMARK_NAME:
            found.benchmarks[name] = cast(Benchmark, _read(path, Benchmark))
        elif path.name == STATE_NAME and name.rpartition("/")[0] not in found.histories:
            # Of a training that has not ended, or was not told to say more.
            found.histories[name] = _read(path, Facts).get("log_history") or []
    kept, found.notes = sort_out(runs)
    for run in kept:
        _add(found, run)
    if not (found.models or found.benchmarks or found.histories):
        raise CAPError(
            f"{folder} holds no {REPORT_NAME}, {BENCHMARK_NAME} or {STATE_NAME} of a run: name the --output_dir of one"
        )
    _compare(found, kept)
    return found


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


def _read(path: Path, expected: Any) -> dict:
    """Return what a file holds, of a type as `check_types` knows them."""
    with _to_mend(path):
        content = read_json(path)
        check_types(content, expected, path)
    return content


@contextmanager
def _to_mend(path: Path) -> Iterator[None]:
    """Say in an error about a file that a run has written what to do about it."""
    try:
        yield
    except CAPError as error:
        raise CAPError(f"{error}; remove {path}, or run again what writes it") from error


def _read_report(path: Path, name: str) -> Run:
    """Return what a report says."""
    content = _read(path, Facts)
    facts, results = cast(Facts, content), content.get("results")
    listed = results is not None
    if results is None:
        results = [{**content, "checkpoint": ""}]
    elif isinstance(results, dict):  # of the demo, by method and sparsity
        results = [{**each, "checkpoint": key} for key, each in results.items() if isinstance(each, dict)]
    with _to_mend(path):
        check_types(results, list[Result], f"{path}: results")
    return Run(name, path, facts, cast(list[Result], results), listed)


def _add(found: Found, run: Run) -> None:
    """Add what a run has made and noted down."""
    facts, name, kind = run.facts, run.name, kind_of(run.facts)
    for result in run.results:
        pruning = result.get("pruning") or cast(Pruning, {})
        layers = pruning.get("layers") or facts.get("layers") or []
        with _to_mend(run.path):
            check_types(layers, list[Layer], f"{run.path}: layers")
        sparsity = pruning.get("sparsity") if kind == PRUNED else facts.get("sparsity")
        if sparsity is None:
            continue
        metrics = (result.get("sparse") if kind == PRUNED else None) or result.get("recovered") or {}
        label = "/".join(each for each in (name, result.get("checkpoint", "")) if each) or found.folder.name
        model = Model(label, series_of(facts, result), sparsity, dict(metrics), cast(list[Layer], layers))
        model.dense, model.settings, model.when = dict(facts.get("dense") or {}), settings_of(facts, result), run.when
        model.run, model.made_by = run.name, kind
        found.models.append(model)
    search = facts.get("search")
    if search:
        found.searches[run.title] = search
    if facts.get("phases"):
        found.phases[name] = facts["phases"] or []
    if facts.get("log_history"):
        found.histories[name] = facts["log_history"] or []
    record = _read_record(found, run)
    _note_command(found, run, record)


def _compare(found: Found, runs: list[Run]) -> None:
    """Find out which models began with the same, and name what does not belong together."""
    measured = [
        next((each.metrics for each in found.models if each.run == run.name and each.metrics), {}) for run in runs
    ]
    origins = [origin_of(run.facts, figures) for run, figures in zip(runs, measured, strict=True)]
    parents = [_parent(found, runs, origin.parent) for origin in origins]
    found.origins, places = group(origins, parents)
    of_run = {run.name: found.origins[place] for run, place in zip(runs, places, strict=True)}
    for model in found.models:
        model.origin = of_run[model.run]
    tell_apart(found.models)
    found.about = _about(runs, found.origins)
    if len(found.origins) > 1:
        labels = "; ".join(origin.label for origin in found.origins)
        found.notes.append(
            f"The runs began with different models, or measured them on different data ({labels}): each drop is against"
            " the dense model of its own run, and lines of different ones are not to be compared."
        )


def _parent(found: Found, runs: list[Run], name: str | None) -> int | None:
    """Return the number of the run whose model a recovery began with, if it is on the page and no other fits."""
    if name is None:
        return None
    made = {model.run for model in found.models if model.name and same_place(name, model.name)}
    numbers = [number for number, run in enumerate(runs) if run.name in made and run.facts.get("model_name_or_path")]
    return numbers[0] if len(numbers) == 1 else None


def _about(runs: list[Run], origins: list[Origin]) -> dict[str, Any]:
    """Return what the head of the page says: where runs differ, all that they say."""
    said: dict[str, list] = {
        "model": [origin.model for origin in origins],
        "data": [origin.data for origin in origins],
        "split": [origin.split for origin in origins],
        "processes": [run.facts.get("num_processes") for run in runs],
        "device": [cast(dict, run.facts).get("device") for run in runs],
        "seed": [run.facts.get("seed") for run in runs],
    }
    about: dict[str, Any] = {}
    for key, values in said.items():
        each = list(dict.fromkeys(str(value) for value in values if value is not None))
        if each:
            about[key] = ", ".join(each)
    versions: dict[str, list[str]] = {}
    for run in runs:
        for package, version in (run.facts.get("versions") or {}).items():
            versions.setdefault(package, []).append(version)
    if versions:
        about["versions"] = {package: ", ".join(dict.fromkeys(each)) for package, each in versions.items()}
    return about


def _read_record(found: Found, run: Run) -> Record:
    """Return what a run has noted down: nothing that another one did, nor of a checkpoint that is another's by now."""
    place = run.path.parent / RECORD_FOLDER / RECORD_NAME
    if not place.is_file():
        return {}
    content = _read(place, Record)
    if content.get("report_sha256") != hashlib.sha256(run.path.read_bytes()).hexdigest():
        found.notes.append(f"{place.relative_to(found.folder)} is of another run than {REPORT_NAME} and was left out.")
        return {}
    record = cast(Record, content)
    if run.listed:
        told = {result.get("checkpoint") for result in run.results}
        record["changed"] = {name: each for name, each in (record.get("changed") or {}).items() if name in told}
    found.records[run.name] = record
    return record


def _note_command(found: Found, run: Run, record: Record) -> None:
    typed, facts = record.get("command"), run.facts
    if typed:
        found.commands.append((run.title, typed, True))
        return
    config = facts.get("config") or {}
    for result in run.results:
        pruning = result.get("pruning")
        whole = cast(Report, {**facts, **({"pruning": pruning, "steps": result.get("steps")} if pruning else {})})
        if result.get("healing"):
            whole["healing"] = cast(Any, result["healing"])
        asked = pruning.get("requested_sparsity") or pruning.get("sparsity", 0.0) if pruning else None
        sparsity = facts.get("sparsity") or 0.0 if asked is None else asked
        command = command_line(kind_of(facts), run_of(whole), config, sparsity)
        if command:
            found.commands.append(("/".join(filter(None, (run.title, result.get("checkpoint", "")))), command, False))
