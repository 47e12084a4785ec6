"""Spectra, training, speed and seconds: figures as runs have written them."""

import pytest
from support.charts import compiled, drawn
from support.runs import benchmark, record, recovered, report

from cap_hf import CAPError
from cap_hf.pages.run_charts import seconds_chart, spectrum_chart, speed_charts, training_charts


def test_a_spectrum_is_relative_to_its_largest_eigenvalue():
    spectra = record()["spectra"]
    spectra[0]["kinds"]["with prior"] = {"ranks": [1, 2, 3], "values": [4.0, 2.0, 0.0]}
    chart = spectrum_chart(spectra)
    values = [value for value in chart.spec["data"]["values"] if value["of"] == "with prior"]
    # What is 0 has no logarithm.
    assert [(value["rank"], value["part"], value["value"]) for value in values] == [(1, 1.0, 4.0), (2, 0.5, 2.0)]
    assert values[0]["layer"] == "q of block 0"
    assert chart.rows[0] == [spectra[0]["name"], 16, 16, 8, "1.00e-08"]
    compiled(chart)
    assert spectrum_chart([]) is None


@pytest.mark.parametrize(
    "wrong", [[{}], [{"name": "a", "kinds": []}], [{"name": "a", "kinds": {"b": {"values": 3}}}], [3]]
)
def test_a_spectrum_that_no_run_writes_is_an_error(wrong):
    with pytest.raises(CAPError, match=r"recorded.json .* run it again"):
        spectrum_chart(wrong)


def test_training_is_told_by_its_log():
    charts = {chart.name: chart for chart in training_charts({"r": recovered()["log_history"]})}
    assert list(charts) == ["training-loss", "training-accuracy", "learning-rate"]
    loss = [(value["step"], value["value"], value["what"]) for value in charts["training-loss"].spec["data"]["values"]]
    assert loss == [(1, 2.0, "train"), (2, 1.5, "train"), (2, 1.4, "evaluation")]
    assert [value["value"] for value in charts["training-accuracy"].spec["data"]["values"]] == [85.0]
    two = training_charts(
        {"a": [{"step": 0, "sparsity": 0.5}, {"step": 9, "sparsity": 0.9}], "b": recovered()["log_history"]}
    )
    assert [chart.name for chart in two][-1] == "training-sparsity"
    assert [value["value"] for value in two[-1].spec["data"]["values"]] == [50.0, 90.0]
    for chart in (*charts.values(), *two):
        compiled(chart)
    assert training_charts({"r": [{"loss": "low"}, {"step": 1}]}) == []


def test_speed_is_that_of_the_benchmark():
    (chart,) = speed_charts({"": benchmark()})
    values = {value["backend"]: value for value in chart.spec["data"]["values"]}
    assert values["dense"]["rate"] == pytest.approx(8 / 0.04)
    assert (values["sparse"]["low"], values["sparse"]["high"]) == (pytest.approx(8 / 0.0066), pytest.approx(8 / 0.0054))
    assert chart.choices == ["batch 8, 2 threads"]
    compiled(chart)
    assert drawn(chart).count('aria-roledescription="bar"') == 2
    assert speed_charts({}) == []


def test_of_several_sparsities_speed_is_drawn_against_them():
    rate, speedup = speed_charts({"a": benchmark(0.5), "b": benchmark(0.9)})
    assert rate.choices == ["a: batch 8, 2 threads", "b: batch 8, 2 threads"]
    values = speedup.spec["layer"][0]["data"]["values"]
    assert [(value["backend"], value["sparsity"]) for value in values] == [("sparse", 50.0), ("sparse", 90.0)]
    assert values[1]["speedup"] == pytest.approx(0.04 / 0.006)
    compiled(speedup)


def test_a_benchmark_that_is_none_is_an_error():
    with pytest.raises(CAPError, match="benchmark.json holds no measurements"):
        speed_charts({"": {"measurements": [{"backend": "dense"}]}})


def test_seconds_are_those_of_the_phases():
    chart = seconds_chart({"": report()["phases"]})
    assert [(value["phase"], value["seconds"]) for value in chart.spec["data"]["values"]] == [
        ("load", 1.5),
        ("collect", 12.0),
    ]
    assert chart.rows[1] == ["collect", "12.0", "2.00 GiB (cpu)"]
    compiled(chart)
    both = seconds_chart({"a": report()["phases"], "b": report()["phases"]})
    assert [value["phase"] for value in both.spec["data"]["values"]] == [
        "a: load",
        "a: collect",
        "b: load",
        "b: collect",
    ]
    assert seconds_chart({}) is None
