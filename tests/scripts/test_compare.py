"""Comparing two files of a benchmark: what both have, how they differ, and whether that is more than the spread."""

import json

import pytest
from support.scripts import load_script, run_script

compare = load_script("benchmarks/compare.py")


def write(folder, name, content):
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_ratios_of_medians_and_marks(tmp_path, monkeypatch, capsys):
    old = {
        "arguments": {"threads": 2, "json": "old.json"},
        "row_keys": ["sparsity"],
        "results": [
            {"model": "vit", "sparsity": 0.5, "seconds": [4.0, 3.0, 5.0], "speedup": 2.0, "ok": True},
            {"model": "vit", "sparsity": 0.75, "seconds": [2.0, 1.9, 2.1]},
            {"model": "vit", "sparsity": 0.9, "seconds": [1.0]},
        ],
    }
    new = {
        "arguments": {"threads": 4, "json": "new.json"},
        "row_keys": ["sparsity"],
        # Another order, and one row less: the run was stopped.
        "results": [
            {"model": "vit", "sparsity": 0.75, "seconds": [2.2, 2.1, 2.3]},
            {"model": "vit", "sparsity": 0.5, "seconds": [1.0, 0.5, 2.5], "speedup": 3.0, "ok": True},
        ],
    }
    run_script(
        "benchmarks/compare.py",
        write(tmp_path, "old.json", old),
        write(tmp_path, "new.json", new),
        monkeypatch=monkeypatch,
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "not the same arguments: threads 2 -> 4",
        "results, vit 0.5, seconds 4 (3-5) 1 (0.5-2.5) 0.250 *",
        "results, vit 0.5, speedup 2 3 1.500",
        "results, vit 0.75, seconds 2 (1.9-2.1) 2.2 (2.1-2.3) 1.100",
        "3 figures; * outside the spread, as the ranges do not meet: 1",
    ]


def test_figures_of_a_nested_file():
    content = {
        "versions": {"torch": 2},
        "fisher": {"median_seconds": {"ours": 2.0}, "seconds": {"ours": [2.0, 2.5, 1.5]}, "note": "text"},
        "axes": {"width": [{"value": 96, "collect": 1.0}, {"value": 192, "collect": 4.0}]},
        "pairs": [[1.0, 2.0], [3.0, 4.0]],
        "empty": [],
    }
    assert compare.figures(content, ["value"]) == {
        "fisher, median_seconds, ours": [2.0],
        "fisher, seconds, ours": [2.0, 2.5, 1.5],
        "axes, width, 96, collect": [1.0],
        "axes, width, 192, collect": [4.0],
        "pairs, #1": [1.0, 2.0],
        "pairs, #2": [3.0, 4.0],
    }


def test_rows_of_one_name_have_numbers():
    content = {"rows": [{"name": "a", "x": 1}, {"name": "a", "x": 2}, {"x": 3}]}
    assert compare.figures(content, []) == {"rows, a, x": [1], "rows, a #2, x": [2], "rows, #1, x": [3]}


@pytest.mark.parametrize(
    ("old", "new", "ratio", "mark"),
    [
        ([2.0], [3.0], "1.500", ""),
        ([0], [0], "1.000", ""),
        ([0], [1], "-", ""),
        ([2.0, 1.0, 3.0], [3.5], "1.750", "*"),
        ([2.0, 1.0, 3.0], [2.5], "1.250", ""),
        ([1.0], [3.0, 2.0, 4.0], "3.000", "*"),
    ],
)
def test_a_mark_means_that_the_ranges_do_not_meet(old, new, ratio, mark):
    assert compare.compare("x", old, new)[-2:] == (ratio, mark)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot read"), ("[1]", "is not a benchmark's file"), ('{"a": 1}', "no figure in common")],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, monkeypatch, content, message):
    (tmp_path / "old.json").write_text(content)
    new = write(tmp_path, "new.json", {"b": 1})
    with pytest.raises(SystemExit, match=message):
        run_script("benchmarks/compare.py", tmp_path / "old.json", new, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match="cannot read"):
        run_script("benchmarks/compare.py", tmp_path / "none.json", new, monkeypatch=monkeypatch)
