"""What was run into a folder is found, once, and nothing in it is believed."""

import json

import pytest
from support.runs import benchmark, measured, pruning, record, recovered, report, search, write, write_run

from cap_hf import CAPError
from cap_hf.pages.runs import find_runs


def test_models_of_one_run(tmp_path):
    write_run(tmp_path)
    for result in report()["results"]:  # each checkpoint has its own report, which says the same
        write(tmp_path / result["checkpoint"] / "report.json", report(results=None) | result)
    found = find_runs(tmp_path)
    assert [(model.name, model.series) for model in found.models] == [("sparsity-0.5", "cap"), ("sparsity-0.9", "cap")]
    assert found.models[1].metrics == measured(0.81)
    assert found.models[1].layers == report()["results"][1]["pruning"]["layers"]
    (origin,) = found.origins
    assert origin.dense == measured(0.92, drop=False)
    assert all(model.origin is origin for model in found.models)
    assert (found.about["model"], found.about["data"], found.about["seed"]) == ("user/vit-tiny", "digits", "42")
    assert found.phases == {"": report()["phases"]}
    commands = [(name, typed) for name, _, typed in found.commands]
    assert commands == [("sparsity-0.5", False), ("sparsity-0.9", False)]
    expected = "cap-hf prune --model_name_or_path user/vit-tiny --dataset_name digits --sparsity 0.9"
    assert found.commands[1][1] == expected


def test_what_an_earlier_run_has_left_is_a_run_of_its_own(tmp_path):
    write_run(tmp_path, report(started="2026-01-02T00:00:00+00:00"))
    earlier = report(sparsities=(0.7,), dense=measured(0.8, drop=False), started="2026-01-01T00:00:00+00:00")
    old = earlier | {"results": None} | earlier["results"][0]
    write(tmp_path / "sparsity-0.7" / "report.json", old)
    found = find_runs(tmp_path)
    assert {model.name: (model.series, model.when) for model in found.models} == {
        "sparsity-0.5": ("cap, from 92.00 %", ""),
        "sparsity-0.7": ("cap, from 80.00 %, an earlier run", "an earlier run"),
        "sparsity-0.9": ("cap, from 92.00 %", ""),
    }
    assert next(model for model in found.models if model.when).dense["top1"] == 0.8
    assert found.commands[-1][0] == "sparsity-0.7 (an earlier run)"
    assert found.commands[-1][1].endswith("--sparsity 0.7")
    assert found.notes[0].startswith("sparsity-0.7 is of an earlier run into the same folder")


def test_runs_of_different_models_with_the_same_figures_are_told_apart(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", report(model_name_or_path="user/deit-tiny", seed=7, versions={"torch": "2.14.0"}))
    alone = recovered() | {"teacher_model_name_or_path": None, "model_name_or_path": "out/b/sparsity-0.9"}
    write(tmp_path / "c" / "report.json", alone | {"dense": None})
    found = find_runs(tmp_path)
    assert [origin.label for origin in found.origins] == ["vit-tiny", "deit-tiny"]
    assert {model.name.split("/")[0]: model.series for model in found.models} == {
        "a": "cap, vit-tiny",
        "b": "cap, deit-tiny",
        "c": "recovered, deit-tiny",
    }
    assert found.about["model"] == "user/vit-tiny, user/deit-tiny"
    assert found.about["seed"] == "42, 7"
    assert found.about["versions"] == {"python": "3.11", "torch": "2.13.0, 2.14.0"}
    assert "(vit-tiny; deit-tiny)" in found.notes[0]


def test_ways_of_making_a_model_are_told_apart(tmp_path):
    write_run(tmp_path / "a", report("magnitude"))
    write_run(tmp_path / "b")
    write_run(tmp_path / "c")
    healed = report(sparsities=(0.9,))
    healed["results"][0] |= {"healing": {"steps": 300}, "steps": [0.6, 0.9]}
    healed["results"][0]["pruning"] |= {"allocation": "uniform", "pattern": "1x4"}
    write_run(tmp_path / "d", healed)
    write(tmp_path / "e" / "report.json", recovered())
    gradual = recovered(0.8)
    gradual["training_arguments"]["sparsity_schedule"] = "0.8"
    write(tmp_path / "f" / "report.json", gradual)
    found = find_runs(tmp_path)
    assert {model.name: model.series for model in found.models} == {
        "a/sparsity-0.5": "magnitude",
        "a/sparsity-0.9": "magnitude",
        "b/sparsity-0.5": "cap (b)",
        "b/sparsity-0.9": "cap (b)",
        "c/sparsity-0.5": "cap (c)",
        "c/sparsity-0.9": "cap (c)",
        "d/sparsity-0.9": "cap 1x4 uniform in 2 steps, healed",
        "e": "recovered",
        "f": "pruned while training",
    }
    assert next(model for model in found.models if model.name == "e").metrics == measured(0.91)
    assert list(found.histories) == ["e", "f"]


def test_the_demo_tells_of_its_models_by_method(tmp_path):
    results = {"cap 0.5": {"sparse": measured(0.9), "pruning": pruning(0.5)}, "cap 0.9 recovered": {"recovered": {}}}
    write(tmp_path / "report.json", {"dense": measured(0.92), "results": results, "phases": []})
    assert [(model.name, model.series) for model in find_runs(tmp_path).models] == [("cap 0.5", "cap")]


def test_what_a_run_has_noted_down(tmp_path):
    write_run(tmp_path, noted=record())
    found = find_runs(tmp_path)
    assert found.records[""]["curve"] == record()["curve"]
    assert found.commands == [("", record()["command"], True)]
    assert found.notes == []


def test_what_another_run_has_noted_down_is_left_out(tmp_path):
    write_run(tmp_path, noted=record())
    write(tmp_path / "report.json", report(seed=7))
    found = find_runs(tmp_path)
    assert found.records == {}
    assert found.notes == ["report/recorded.json is of another run than report.json and was left out."]


def test_changed_images_of_a_checkpoint_that_was_written_again_are_left_out(tmp_path):
    noted, first = record(), report(started="2026-01-01")
    noted["changed"]["sparsity-0.5"] = noted["changed"]["sparsity-0.9"] | {"lost": 0}
    write_run(tmp_path, first, noted)
    assert set(find_runs(tmp_path).records[""]["changed"]) == {"sparsity-0.5", "sparsity-0.9"}
    second = report("magnitude", started="2026-01-02")
    write(tmp_path / "sparsity-0.9" / "report.json", {**second, "results": None} | second["results"][1])
    assert find_runs(tmp_path).records[""]["changed"] == {"sparsity-0.5": noted["changed"]["sparsity-0.5"]}
    # A recovery names its only model otherwise than its folder.
    noted["changed"] = {"recovered": noted["changed"]["sparsity-0.5"]}
    write_run(tmp_path / "r", recovered(), noted)
    assert set(find_runs(tmp_path).records["r"]["changed"]) == {"recovered"}


def test_benchmarks_and_logs_of_a_training_that_has_not_ended(tmp_path):
    write(tmp_path / "sparsity-0.9" / "benchmark.json", benchmark())
    write(tmp_path / "r-training" / "checkpoint-2" / "trainer_state.json", {"log_history": [{"step": 1, "loss": 1.0}]})
    found = find_runs(tmp_path)
    assert found.benchmarks["sparsity-0.9"]["sparsity"] == 0.9
    assert found.histories == {"r-training/checkpoint-2": [{"step": 1, "loss": 1.0}]}


def test_searches_are_found(tmp_path):
    write_run(tmp_path, report(search=search()))
    assert find_runs(tmp_path).searches == {"": search()}


def test_what_is_half_written_or_too_deep_or_a_link_is_not_looked_at(tmp_path):
    write_run(tmp_path / "run")
    write_run(tmp_path / "run" / ".sparsity-0.9.x.partial")
    write_run(tmp_path / "run" / "1" / "2" / "3" / "4" / "5")
    (tmp_path / "run" / "link").symlink_to(write_run(tmp_path / "other"))
    assert [model.name for model in find_runs(tmp_path / "run").models] == ["sparsity-0.5", "sparsity-0.9"]


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(CAPError, match=r"holds no report.json, benchmark.json or trainer_state.json of a run"):
        find_runs(tmp_path)
    with pytest.raises(CAPError, match="is no folder"):
        find_runs(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", "{", r"report.json cannot be read"),
        ("report.json", "", r"report.json cannot be read"),
        ("report.json", "[]", r"report.json holds no JSON object"),
        ("report.json", json.dumps(report(results=None, layers=3, sparsity=0.5)), r"report.json: layers is 3"),
        ("report.json", json.dumps({"results": 3}), r"report.json: results is 3, which is no list"),
        ("report.json", json.dumps({"results": [{"sparse": "x"}]}), r"results\[0\]: sparse is 'x', which is no dict"),
        ("report.json", json.dumps(report(phases=[{"seconds": "long"}])), r"phases\[0\]: seconds is 'long'"),
        ("benchmark.json", json.dumps({"measurements": [1]}), r"benchmark.json: measurements\[0\] is 1"),
        ("report/recorded.json", json.dumps({"curve": []}), r"recorded.json: curve is \[\], which is no dict"),
    ],
)
def test_what_no_run_writes_is_named(tmp_path, name, text, message):
    write_run(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(CAPError, match=message) as error:
        find_runs(tmp_path)
    assert str(error.value).endswith(f"; remove {path}, or run again what writes it")


def test_too_many_reports_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cap_hf.pages.runs.MOST_FILES", 1)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(CAPError, match="more than 1 reports: name a folder further down"):
        find_runs(tmp_path)
