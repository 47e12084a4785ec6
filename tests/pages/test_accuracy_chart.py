"""Accuracy against sparsity: the figures of the reports, their bands, the dense line and the budget."""

import pytest
from support.charts import compiled, drawn
from support.runs import recovered, report, search, write, write_run

from cap_hf.pages.accuracy_chart import accuracy_chart, main_metric, search_chart
from cap_hf.pages.page import lines_of
from cap_hf.pages.runs import find_runs


def texts(chart) -> list[str]:
    return [layer["mark"]["text"] for layer in chart.spec["layer"] if layer["mark"]["type"] == "text"]


def test_points_are_the_figures_of_the_reports(tmp_path):
    write_run(tmp_path / "cap")
    write_run(tmp_path / "magnitude", report("magnitude"))
    write(tmp_path / "r" / "report.json", recovered())
    chart = accuracy_chart(find_runs(tmp_path))
    points = {(each["model"], each["series"]): each for each in chart.spec["data"]["values"]}
    point = points["cap/sparsity-0.9", "cap"]
    assert point["value"] == pytest.approx(81)
    assert (point["low"], point["high"]) == (pytest.approx(81 - 1.96), pytest.approx(81 + 1.96))
    assert (point["drop"], point["error"]) == (pytest.approx(11), pytest.approx(1))
    assert points["r", "recovered"]["value"] == pytest.approx(91)
    # Lines of what was pruned begin at the dense model.
    assert points["dense", "magnitude"]["sparsity"] == 0
    assert points["dense", "magnitude"]["value"] == pytest.approx(92)
    assert ("dense", "recovered") not in points
    assert texts(chart) == ["dense"]
    assert len(chart.rows) == 5
    assert chart.rows[1] == ["cap/sparsity-0.9", "cap", "90.55", "81.00 ± 1.00", "11.00 ± 0.50"]
    compiled(chart)
    assert "dense" in drawn(chart)


def test_the_budget_is_a_line(tmp_path):
    write_run(tmp_path, report(search=search(0.02)))
    chart = accuracy_chart(find_runs(tmp_path))
    assert texts(chart) == ["dense", "allowed: 2 less"]
    rules = [layer["encoding"]["y"] for layer in chart.spec["layer"] if layer["mark"]["type"] == "rule"]
    heights = [height["datum"] for height in rules if "datum" in height]
    assert heights == [pytest.approx(92), pytest.approx(90)]


def test_of_a_search_every_try_is_shown(tmp_path):
    found = find_runs(write_run(tmp_path, report(search=search())))
    chart = search_chart(found)
    first, second = chart.spec["data"]["values"]
    assert (first["sparsity"], first["drop"], first["result"]) == (50, 0.01, "allowed")
    assert (first["low"], first["high"]) == (pytest.approx(0.01 - 0.0196), pytest.approx(0.01 + 0.0196))
    assert (second["sparsity"], second["result"]) == (90, "too much")
    assert "low" not in second
    compiled(chart)
    # What was allowed of another metric is no line of this chart.
    found.searches[""]["metric"] = "loss"
    assert texts(accuracy_chart(found)) == ["dense"]
    found.searches.clear()
    assert search_chart(found) is None


def test_a_backbone_is_compared_by_what_was_measured_of_it(tmp_path):
    content = report(dense={"cosine": 1.0})
    for result in content["results"]:
        result["sparse"] = {"cosine": 0.9, "cosine_se": 0.01, "num_examples": 10}
    write_run(tmp_path, content)
    found = find_runs(tmp_path)
    assert main_metric(found).key == "cosine"
    chart = accuracy_chart(found)
    assert chart.spec["data"]["values"][0]["value"] == 0.9
    compiled(chart)


def test_of_what_was_not_measured_there_is_no_chart(tmp_path):
    content = report(dense=None)
    for result in content["results"]:
        result["sparse"] = None
    write_run(tmp_path, content)
    assert accuracy_chart(find_runs(tmp_path)) is None


def test_each_drop_is_against_the_dense_model_of_its_own_run(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", report("magnitude", dense={"top1": 0.86}))
    found = find_runs(tmp_path)
    chart = accuracy_chart(found)
    values = chart.spec["data"]["values"]
    drops = {each["model"]: each["drop"] for each in values if each["model"] != "dense"}
    assert drops["a/sparsity-0.9"] == pytest.approx(11)
    assert drops["b/sparsity-0.9"] == pytest.approx(5)
    # Each line begins at its own dense model, which is a level of its own.
    starts = {each["series"]: each["value"] for each in values if each["model"] == "dense"}
    assert starts == {"cap, from 92.00 %": pytest.approx(92), "magnitude, from 86.00 %": pytest.approx(86)}
    assert texts(chart) == ["dense, from 92.00 %", "dense, from 86.00 %"]
    assert chart.rows[-1][-1] == "5.00 ± 0.50"
    lines = lines_of(found)
    assert [line[:2] for line in lines[:2]] == [["dense", "from 92.00 %"], ["dense", "from 86.00 %"]]
    assert "5.00 ± 0.50" in lines[-1]
    assert "each drop is against the dense model of its own run" in found.notes[0]
    compiled(chart)


def test_what_was_allowed_is_a_line_only_where_it_is_the_same(tmp_path):
    write_run(tmp_path / "a", report(search=search(0.02)))
    write_run(tmp_path / "b", report("magnitude", search=search(0.05)))
    found = find_runs(tmp_path)
    assert texts(accuracy_chart(found)) == ["dense"]
    searched = search_chart(found)
    levels = [layer["encoding"]["y"].get("datum") for layer in searched.spec["layer"] if "encoding" in layer]
    assert [level for level in levels if level is not None] == [0.02, 0.02, 0.05, 0.05]
    compiled(searched)
