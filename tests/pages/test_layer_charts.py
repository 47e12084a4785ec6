"""The map of the model, and what removals cost: figures as reports have them, places as names say."""

import pytest
from support.charts import compiled, drawn
from support.runs import layer_names, pruning, record, report, write_run

from cap_hf.pages.layer_charts import curve_charts, map_charts
from cap_hf.pages.runs import find_runs


def test_the_map_has_a_square_per_layer_and_checkpoint(tmp_path):
    found = find_runs(write_run(tmp_path))
    sparsity, loss = map_charts(found)
    values = sparsity.spec["data"]["values"]
    assert len(values) == 2 * len(layer_names())
    assert sparsity.choices == loss.choices == ["sparsity-0.5", "sparsity-0.9"]
    layers = pruning(0.9)["layers"]
    total = sum(layer["loss"] for layer in layers)
    for value, layer in zip(values[len(layers) :], layers, strict=True):
        assert value["layer"] == layer["name"]
        assert value["model"] == 1
        assert value["sparsity"] == pytest.approx(100 * layer["num_zeros"] / 1000)
        assert value["part"] == pytest.approx(100 * layer["loss"] / total)
    square = next(value for value in values if value["layer"] == "vit.encoder.layer.2.attention.output.dense")
    assert (square["depth"], square["kind"]) == (2, "o")
    assert sparsity.spec["encoding"]["y"]["sort"] == ["q", "o", "fc1", "fc2"]
    for chart in (sparsity, loss):
        compiled(chart)
        assert drawn(chart).count('aria-roledescription="rect mark"') >= len(layers)


def test_without_losses_there_is_no_map_of_them(tmp_path):
    content = report("magnitude", (0.5,))
    for layer in content["results"][0]["pruning"]["layers"]:
        layer["loss"] = None
    (chart,) = map_charts(find_runs(write_run(tmp_path, content)))
    assert chart.rows[0][3] == "-"
    content["results"][0]["pruning"]["layers"] = []
    assert map_charts(find_runs(write_run(tmp_path, content))) == []


def test_curves_are_those_that_were_noted_down(tmp_path):
    found = find_runs(write_run(tmp_path))
    noted = record()["curve"]
    # Attention gives up less than the others.
    noted["layers"] = {
        name: [share / (2 if "attention" in name else 1) for share in noted["sparsity"]] for name in layer_names()
    }
    following, total, kinds = curve_charts(noted, found.models)
    line = following.spec["layer"][-1]
    assert [point["marginal"] for point in line["data"]["values"]] == noted["marginal"]
    assert [point["total"] for point in total.spec["layer"][-1]["data"]["values"]] == noted["total"]
    marks = [value["at"] for value in following.spec["layer"][0]["data"]["values"]]
    assert marks == pytest.approx([100 * model.sparsity for model in found.models])
    values = {(value["kind"], value["sparsity"]): value["own"] for value in kinds.spec["layer"][-1]["data"]["values"]}
    assert values["fc1", 50.0] == pytest.approx(50)
    assert values["q", 50.0] == pytest.approx(25)
    for chart in (following, total, kinds):
        compiled(chart)
        assert "line mark" in drawn(chart)


def test_without_a_curve_there_is_no_chart():
    assert curve_charts(None, []) == []
    assert curve_charts({"sparsity": []}, []) == []
