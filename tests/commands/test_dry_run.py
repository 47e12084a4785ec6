"""`cap-hf prune --dry_run`: what it prints, and what it leaves alone."""

import re

import pytest
from support.commands import prune
from support.models import build
from transformers import ViTImageProcessor

from cap_hf.collection.forecast import Forecast
from cap_hf.collection.plan import Plan
from cap_hf.commands import dry_run
from cap_hf.commands.dry_run import NOTE, Counts, Phase, Reading, phases, plan_table, reading_seconds, repeated
from cap_hf.targets import find_targets


def columns(printed: str) -> dict[str, list[str]]:
    """Return the cells of a printed plan by their heading."""
    lines = printed.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("processes"))
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[first + 2 : first + 6]]
    return dict(zip(re.split(r"\s{2,}", lines[first]), zip(*rows, strict=True), strict=True))


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ("--sparsity", "0.5", "0.75", "--heal_steps", "3", "--dry_run", "true")
    assert prune(tiny_checkpoint, output, *arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    found = columns(capsys.readouterr().out)
    expected = ["processes", "passes", "blocks", "memory", "disk", "collect", "eliminate", "reconstruct", "refit"]
    assert [*found] == [*expected, "heal", "evaluate", "together"]
    assert found["processes"] == ("1", "2", "4", "8")
    assert set(found["passes"]) == {"1"}
    assert set(found["disk"]) == {"-"}
    assert all(re.fullmatch(r"\d+:\d\d", each) for each in found["together"])


def test_a_dry_run_may_stand_beside_results_and_leaves_them(tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5") == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5", "--dry_run", "true") == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_what_takes_no_time_has_no_column(tiny_checkpoint, tmp_path, capsys):
    arguments = ("--sparsity", "0.5", "--method", "magnitude", "--dry_run", "true")
    assert prune(tiny_checkpoint, tmp_path / "out", *arguments) == 0
    found = columns(capsys.readouterr().out)
    assert [*found] == ["processes", "passes", "blocks", "memory", "disk", "evaluate", "together"]
    assert set(found["passes"]) == {"-"}
    assert prune(tiny_checkpoint, tmp_path / "out", *arguments, "--do_eval", "false") == 0
    assert [*columns(capsys.readouterr().out)][-2:] == ["disk", "together"]


def test_a_dry_run_says_what_would_not_fit(tiny_checkpoint, tmp_path, capsys):
    arguments = ("--sparsity", "0.5", "--max_memory", "1KB", "--dry_run", "true")
    assert prune(tiny_checkpoint, tmp_path / "out", *arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("with 1 process: any Fisher (")
    assert printed.count("does not fit") == len(printed.splitlines())
    assert NOTE not in printed


def test_phases_have_the_seconds_of_the_images_that_they_read():
    each = Forecast(2, None, {"collecting": 10.0, "eliminating": 1.0}, {"collecting": 300})
    # Each process heals on as many as one alone; nothing is evaluated.
    after = {"healing": Phase(40, 2.0, each=True), "recalibrating": Phase(60, 0.5), "evaluating": Phase(0, 0.5)}
    found = phases(each, Reading(0.1, 0), after)
    expected = {
        "collecting": 10 + 150 * 0.1,
        "eliminating": 1.0,
        "recalibrating": 30 * 0.5 + 30 * 0.1,
        "healing": 40 * 2.0 + 40 * 0.1,
    }
    assert found == pytest.approx(expected)
    assert [*found] == [*expected]
    # Beside the model, reading takes only what it takes longer.
    found = phases(each, Reading(0.1, 1), after)
    assert found == pytest.approx({"collecting": 15.0, "eliminating": 1.0, "recalibrating": 15.0, "healing": 80.0})


def test_processes_in_which_nothing_fits_stand_below_the_table():
    plan = Plan([find_targets(build("ViT"))], 192, 8, 8, needed=3 * 10**9, spilled=2 * 10**9)
    forecasts = [Forecast(1, problem="too little memory"), Forecast(2, problem="too little memory"), Forecast(4, plan)]
    found = plan_table(forecasts, [{}, {}, {"collecting": 61.0, "evaluating": 5.0}])
    *table, problem = found.splitlines()
    assert table[2].split() == ["4", "1", "192", "3.0", "GB", "2.0", "GB", "1:01", "0:05", "1:06"]
    assert "\n".join(table[3:]).strip() == NOTE
    assert problem == "with 1 or 2 processes: too little memory"


def test_images_are_read_twice_and_timed_once(monkeypatch):
    times = iter([0.0, 50.0, 60.0, 62.0])
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(times))
    assert reading_seconds(range(4)) == 0.5


def test_a_resnet_is_told_of_its_batch_norm(tmp_path, capsys):
    dense = tmp_path / "dense"
    build("ResNet", image_size=8, num_labels=10).save_pretrained(dense)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(dense)
    assert prune(dense, tmp_path / "out", "--sparsity", "0.5", "--dry_run", "true") == 0
    assert "batch norm" in columns(capsys.readouterr().out)


def test_a_collection_for_every_step_is_foreseen(monkeypatch):
    each = Forecast(2, None, {"collecting": 10.0, "refitting": 1.0}, {"collecting": 300, "refitting": 20})
    found = repeated(each, 6)
    assert found.seconds == {"collecting": 60.0, "refitting": 6.0}
    assert found.images == {"collecting": 1800, "refitting": 120}
    assert found.processes == 2


def test_a_dry_run_counts_the_steps(tiny_checkpoint, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(dry_run, "print_plan", lambda *args: counted.append((args[0].afterwards.prunes, args[4])))
    arguments = ("--sparsity", "0.5", "0.75", "--dry_run", "true", "--do_eval", "false")
    assert prune(tiny_checkpoint, tmp_path / "out", *arguments) == 0
    assert prune(tiny_checkpoint, tmp_path / "out", *arguments, "--num_recomputations", "2") == 0
    assert counted == [(2, Counts(2, 1, 0, False)), (1, Counts(2, 3, 0, False))]


def test_a_plan_on_paper_names_the_gpu_and_its_count(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5", "--plan_for", "gpu=l4,count=3") == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:3]] == ["3"]
    assert "On paper: each process has one L4 (24.0 GB, 30.3 TFLOP/s in float32" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
