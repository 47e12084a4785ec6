"""Ranges of sparsities, and the arguments of a search, checked before anything is loaded."""

import json
from fractions import Fraction

import pytest
import yaml
from support.commands import prune

from cap_hf import CAPConfig
from cap_hf.commands.main import main
from cap_hf.commands.prune_arguments import PruneArguments, check_sparsities
from cap_hf.commands.search_arguments import SearchArguments, check_search, read_sparsities
from cap_hf.errors import CAPError


@pytest.mark.parametrize(
    ("begin", "end", "step"), [("0.5", "0.95", "0.05"), ("0", "0.9", "0.1"), ("0.001", "0.1", "0.003")]
)
def test_a_range_is_exact_in_decimals_and_has_its_end(begin, end, step):
    number, expected = Fraction(begin), []
    while number <= Fraction(end):
        expected.append(float(number))
        number += Fraction(step)
    assert read_sparsities([f"{begin}:{end}:{step}"]) == expected
    assert expected[-1] == float(end)


def test_numbers_and_ranges_are_mixed():
    assert read_sparsities(["0.5:0.9:0.1", "0.95"]) == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert read_sparsities(["0.3 0.5:0.6:0.1", 0.25, ".9", "9.5e-1"]) == [0.3, 0.5, 0.6, 0.25, 0.9, 0.95]
    assert read_sparsities(["0.5:0.5:0.1"]) == [0.5]
    assert check_sparsities(["0.9", "0.7:0.9:0.1", "0.7"], CAPConfig()) == [0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("half", "sparsity 'half' is no number, and no range such as 0.5:0.95:0.05"),
        ("0.5:0.9", "'0.5:0.9' is no range: that is begin:end:step"),
        ("0.5:0.9:0.1:0.1", "is no range"),
        ("0.5::0.1", "is no number, and no range"),
        ("0.5:0.9:inf", "is no range"),
        ("0.5:nan:0.1", "is no range"),
        ("0.9:0.5:0.1", "has nothing in it: begin:end:step goes up"),
        ("0.5:0.9:0", "has nothing in it"),
        ("0.5:0.9:-0.1", "has nothing in it"),
        ("0.5:0.92:0.05", "'0.5:0.92:0.05' goes from 0.90 to 0.95: end it at one of them"),
        ("0:0.9:0.0001", "has more than 1000 sparsities, and each is a checkpoint: take a larger step"),
        ("0:0.5:1e-5000", "has more than 1000 sparsities"),
        ("0:0.5:1e-9999999", "has more than 1000 sparsities"),
        ("0:1:1e-5000", "sparsity 1 is not in [0, 1)"),
        ("0:9e999999:1e-999999", "sparsity 9E+999999 is not in [0, 1)"),
        ("-0.1:0.5:0.1", "sparsity -0.1 is not in [0, 1)"),
        ("sNaN", "sparsity sNaN is not in [0, 1)"),
        ("0.5:sNaN:0.1", "is no range"),
        ("0.5:1:0.1", "sparsity 1 is not in [0, 1)"),
        ("nan", "sparsity nan is not in [0, 1)"),
        ("1e400", "sparsity inf is not in [0, 1)"),
    ],
)
def test_what_is_no_sparsity_is_one_line(text, line):
    with pytest.raises(CAPError) as error:
        check_sparsities([text], CAPConfig())
    assert line in str(error.value)


@pytest.mark.parametrize(
    "written", ["0.3:0.5:0.1", ["0.3:0.5:0.1"], "0.3:0.4:0.1 0.5", [0.3, "0.4:0.5:0.1"], [0.3, 0.4, 0.5]]
)
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_files_take_every_way_of_writing(tiny_checkpoint, tmp_path, written, ending):
    values = {"model_name_or_path": str(tiny_checkpoint), "output_dir": str(tmp_path / "out"), "sparsity": written}
    values |= {"method": "magnitude", "do_eval": False, "disable_tqdm": True}
    file = tmp_path / f"run.{ending}"
    file.write_text((yaml.safe_dump if ending == "yaml" else json.dumps)(values))
    assert main(["prune", str(file)]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["report.json", "sparsity-0.3", "sparsity-0.4", "sparsity-0.5"]


def test_yaml_without_quotes(tmp_path):
    """A colon may mean several things in YAML."""
    text = "a: 0.5:0.95:0.05\nb: [0.5:0.95:0.05, 0.97]\nc: 0:0.9:0.1\nd:\n  - 0:0.5:0.1\n  - 0.95\n"
    assert yaml.safe_load(text) == {
        "a": "0.5:0.95:0.05",
        "b": ["0.5:0.95:0.05", 0.97],
        "c": "0:0.9:0.1",
        "d": ["0:0.5:0.1", 0.95],
    }


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"max_accuracy_drop": -0.01}, "max_accuracy_drop=-0.01 must be in [0, 1]: 0.01 is one point"),
        ({"max_accuracy_drop": 1.5}, "max_accuracy_drop=1.5 must be in [0, 1]"),
        ({"max_accuracy_drop": float("nan")}, "must be in [0, 1]"),
        ({"max_accuracy_drop": float("inf"), "max_drop_metric": "loss"}, "must be at least 0, and finite"),
        ({"max_accuracy_drop": 0.01, "sparsity_step": 0.0}, "sparsity_step=0 must be at least 1e-06"),
        ({"max_accuracy_drop": 0.01, "sparsity_step": 1.0}, "sparsity_step=1 must be at least"),
        ({"max_accuracy_drop": 0.01, "max_evaluations": 0}, "max_evaluations=0 must be at least 1"),
        ({"max_accuracy_drop": 0.01, "max_search_samples": -1}, "max_search_samples=-1 must be at least 1"),
        ({"max_drop_metric": "knn"}, "--max_drop_metric is for a search: say what may be lost, such as"),
        ({"sparsity_step": 0.1}, "--sparsity_step is for a search"),
        ({"max_search_samples": 3}, "--max_search_samples is for a search"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(changes, line):
    with pytest.raises(CAPError) as error:
        SearchArguments(**changes)
    assert line in str(error.value)


def test_what_a_search_takes():
    assert SearchArguments().num_images == 0
    assert SearchArguments(max_accuracy_drop=0.0).num_images == 2000
    assert SearchArguments(max_accuracy_drop=3.0, max_drop_metric="loss", max_search_samples=5).num_images == 5


@pytest.mark.parametrize(
    ("sparsity", "recomputations", "config", "line"),
    [
        (["0.5"], 0, {}, "--max_accuracy_drop finds the sparsity: leave out --sparsity"),
        (None, 0, {"allocation": "2:4"}, "2:4 has one sparsity, and there is nothing to find"),
        (None, 1, {}, "in a single collection: leave out --num_recomputations"),
    ],
)
def test_what_does_not_go_with_a_search(sparsity, recomputations, config, line):
    check_search(SearchArguments(), sparsity, recomputations, CAPConfig(**config))
    check_search(SearchArguments(max_accuracy_drop=0.01), None, 0, CAPConfig())
    with pytest.raises(CAPError, match=line):
        check_search(SearchArguments(max_accuracy_drop=0.01), sparsity, recomputations, CAPConfig(**config))


def test_the_command_checks_before_it_loads(tmp_path, capsys):
    arguments = ["--max_accuracy_drop", "0.01", "--dataset_name", "/nowhere", "--max_drop_metric", "best"]
    (tmp_path / "model").mkdir()
    assert prune(tmp_path / "model", tmp_path / "out", *arguments) == 1
    assert "argument --max_drop_metric/--max-drop-metric: invalid choice: 'best'" in capsys.readouterr().err
    assert prune(tmp_path / "model", tmp_path / "out", *arguments[:4], "--sparsity", "0.5") == 1
    assert "leave out --sparsity" in capsys.readouterr().err
    assert PruneArguments().sparsity is None
