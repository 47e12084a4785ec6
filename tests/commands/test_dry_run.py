"""`cap-hf prune --dry_run`: what it prints, and what it leaves alone."""

import re

import pytest
import torch
from support.commands import prune
from support.models import build

from cap_hf.collection.forecast import Forecast
from cap_hf.collection.plan import Plan
from cap_hf.commands import dry_run
from cap_hf.commands.dry_run import HEALING, Reading, healing_seconds, phases, plan_table, reading_seconds
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
    assert "1: any Fisher (" in printed
    assert "8: any Fisher (" in printed


def test_phases_have_the_seconds_of_the_images_that_they_read():
    plan = Plan([find_targets(build("ViT"))] * 2, "row", 8, 8, recollects=True)  # 3 passes
    each = Forecast(2, plan, {"collecting": 10.0, "eliminating": 1.0})
    counts = {"collecting": 100, "evaluating": 60, "healing": 40, "refitting": 0}
    forwards = {"evaluating": 0.5, "healing": 2.0}
    found = phases(each, Reading(0.1, 0, counts), forwards)
    expected = {
        "collecting": 10 + 3 * 50 * 0.1,
        "eliminating": 1.0,
        # Each process heals on as many as one alone.
        "healing": 40 * 2.0 + 40 * 0.1,
        "evaluating": 30 * 0.5 + 30 * 0.1,
    }
    assert found == pytest.approx(expected)
    assert [*found] == [*expected]
    # Beside the model, reading takes only what it takes longer.
    found = phases(each, Reading(0.1, 1, counts), forwards)
    assert found == pytest.approx({"collecting": 15.0, "eliminating": 1.0, "healing": 80.0, "evaluating": 15.0})


def test_a_number_of_processes_in_which_nothing_fits_stands_below_the_table():
    plan = Plan([find_targets(build("ViT"))], 192, 8, 8, needed=3 * 10**9, spilled=2 * 10**9)
    forecasts = [Forecast(1, problem="too little memory"), Forecast(2, plan)]
    found = plan_table(forecasts, [{}, {"collecting": 61.0, "evaluating": 5.0}])
    *_, row, problem = found.splitlines()
    assert row.split() == ["2", "1", "192", "3.0", "GB", "2.0", "GB", "1:01", "0:05", "1:06"]
    assert problem == "1: too little memory"


def test_images_are_read_twice_and_timed_once(monkeypatch):
    times = iter([0.0, 50.0, 60.0, 62.0])
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(times))
    assert reading_seconds(range(4)) == 0.5


def test_healing_takes_the_dense_model_the_sparse_one_and_its_backward_pass(monkeypatch):
    seen = []
    monkeypatch.setattr(
        dry_run, "forward_seconds", lambda model, batch: seen.append(torch.is_autocast_enabled("cpu")) or 2.0
    )
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    assert [healing_seconds(build("ViT"), batch, bf16) for bf16 in (False, True)] == [2.0 * HEALING] * 2
    assert seen == [False, True]
