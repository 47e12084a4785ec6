"""A benchmark's file: it is there from the start, whole after every row, and says what it was made with."""

import argparse
import json

import pytest
from support.scripts import load_script

from cap_hf import CAPError

results = load_script("benchmarks/results.py")


def arguments(path, **more):
    return argparse.Namespace(json=path, **more)


def test_every_row_is_in_the_file_as_soon_as_it_is_there(tmp_path, capsys):
    path = tmp_path / "out.json"
    with results.Results(arguments(path, threads=2), total=3, keys=("model",)) as found:
        assert json.loads(path.read_text())["arguments"] == {"json": str(path), "threads": 2}
        found.measuring("the first")
        found.add({"model": "a", "seconds": [1.0, 2.0]})
        assert json.loads(path.read_text())["results"] == [{"model": "a", "seconds": [1.0, 2.0]}]
        found.advance(2)
        found.add({"value": 3}, "results by axis", "width")
        found.set(speedup=2.5)
        content = json.loads(path.read_text())
    assert content["results by axis"] == {"width": [{"value": 3}]}
    assert content["speedup"] == 2.5
    assert content["row_keys"] == ["model"]
    assert {"torch", "python"} <= content["versions"].keys()
    assert content["machine"]["threads"] >= 1
    output = capsys.readouterr()
    assert [json.loads(line) for line in output.out.splitlines()] == content["results"] + [{"value": 3}]
    assert "the first" in output.err
    assert "2/3" in output.err


def test_what_is_stopped_leaves_its_rows(tmp_path):
    path = tmp_path / "out.json"

    def stopped():
        with results.Results(arguments(path), total=2) as found:
            found.add({"value": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert json.loads(path.read_text())["results"] == [{"value": 1}]
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CAPError, match="cannot write"), results.Results(arguments(tmp_path / "taken" / "x"), total=1):
        pytest.fail("measured for nothing")


def test_without_a_file_rows_are_printed(capsys):
    with results.Results(arguments(None), total=1) as found:
        found.add({"value": 1})
    assert json.loads(capsys.readouterr().out) == {"value": 1}
