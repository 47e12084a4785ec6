"""The table of accuracies: real runs on a tiny model, rows that are not measured twice, and its errors."""

import json
import math
import statistics

import pytest
from support.scripts import load_script, run_script

from cap_hf.commands.main import main

accuracy = load_script("benchmarks/accuracy.py")


@pytest.fixture
def run(tiny_checkpoint, tmp_path, monkeypatch):
    """Run the script; return what its file has, and the commands that it ran."""

    def run(*arguments, dataset="digits"):
        commands = []

        def command(argv):
            commands.append(argv)
            at = argv.index("--heal_steps") if "--heal_steps" in argv else len(argv)
            return main(argv[:at] + argv[at + 2 :])  # what healing does is tested with it

        path = tmp_path / "accuracy.json"
        names = ("--model_name_or_path", tiny_checkpoint, "--dataset_name", dataset, "--json", path)
        fast = ("--max_eval_samples", 40, "--disable_tqdm")
        run_script("benchmarks/accuracy.py", *names, *arguments, *fast, monkeypatch=monkeypatch, cap_hf=command)
        return json.loads(path.read_text()), commands

    return run


def test_every_combination_is_a_run_and_what_is_there_is_not_measured_again(run, capsys):
    options = ("--sparsity", 0.5, 0.75, "--seeds", 1, 2)
    found, commands = run("--methods", "magnitude", *options)
    assert [argv[argv.index("--seed") + 1] for argv in commands] == ["1", "2"]
    assert not any("--heal_steps" in argv for argv in commands)
    rows = found["results"]
    assert [tuple(row[key] for key in found["row_keys"]) for row in rows] == [
        ("magnitude", seed, sparsity, 0) for seed in (1, 2) for sparsity in (0.5, 0.75)
    ]
    for row in rows:
        assert row["num_examples"] == 40
        assert row["drop"] == row["dense"] - row["top1"]
        assert row["top1_se"] == pytest.approx(math.sqrt(row["top1"] * (1 - row["top1"]) / 40))
        assert row["drop_se"] <= row["dense_se"] + row["top1_se"]
        assert row["seconds"] > 0
    assert "| magnitude | 0 | 2 |" in capsys.readouterr().out

    more = (*options, "--methods", "magnitude", "wanda", "--heal_steps", 0, 3, "--num_grads", 8)
    with pytest.raises(SystemExit, match=r"accuracy\.json has passed_on \['--max_eval_samples', '40'.*name another"):
        run(*more)
    more = (*more[:-2], "--seeds", 1)
    again, commands = run(*more)
    made = [(argv[argv.index("--method") + 1], "--heal_steps" in argv) for argv in commands]
    assert made == [("wanda", False), ("magnitude", True), ("wanda", True)]
    assert again["results"][:4] == rows
    assert len(again["results"]) == 10
    assert "| wanda | 3 | 1 |" in capsys.readouterr().out
    assert run(*more)[1] == []


def test_a_run_that_fails_ends_the_script(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"cap-hf prune .*--method magnitude --seed 0 .* has failed; the rows before"):
        run("--methods", "magnitude", dataset=tmp_path / "nowhere")
    assert "cap-hf prune: " in capsys.readouterr().err


def test_errors_over_seeds_and_images():
    rows = [
        {"method": "cap", "seed": seed, "sparsity": 0.5, "heal_steps": 0, "drop": drop, "drop_se": error}
        | {"dense": 0.76, "dense_se": 0.006, "num_examples": 5000}
        for seed, drop, error in ((0, 0.010, 0.003), (1, 0.016, 0.004), (2, 0.013, 0.005))
    ]
    seeds = statistics.stdev([1.0, 1.6, 1.3]) ** 2 / 3
    images = (0.3**2 + 0.4**2 + 0.5**2) / 3
    assert accuracy.mean_drop(rows) == f"1.30 ± {math.sqrt(seeds + images):.2f}"
    assert accuracy.mean_drop(rows[:1]) == "1.00 ± 0.30"
    lines = accuracy.table([*rows, rows[0] | {"method": "obs", "sparsity": 0.75}]).splitlines()
    assert lines[0] == "Points below the dense model's 76.00 ± 0.60 %, on 5,000 images:"
    assert lines[2:] == [
        "| method | healing steps | seeds | 50 % | 75 % |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| cap | 0 | 3 | {accuracy.mean_drop(rows)} | - |",
        "| obs | 0 | 1 | - | 1.00 ± 0.30 |",
    ]


def test_without_accuracy_there_is_no_row():
    with pytest.raises(SystemExit, match="no accuracy was measured: it needs images with labels"):
        accuracy.rows_of({"dense": {"cosine": 1.0, "num_examples": 3}, "results": [], "phases": []}, 0)


def test_a_prune_to_a_budget_counts_by_what_came_out():
    sparse = {"top1": 0.7, "top1_se": 0.01, "top1_drop_se": 0.005}
    prunings = [
        {"method": "cap", "requested_sparsity": None, "sparsity": 0.6},
        {"method": "cap", "requested_sparsity": 0.5, "sparsity": 0.5001},
    ]
    report = {
        "seed": 0,
        "phases": [],
        "dense": {"top1": 0.75, "top1_se": 0.01, "num_examples": 100},
        "results": [{"pruning": each, "sparse": sparse} for each in prunings],
    }
    rows = accuracy.rows_of(report, 0)
    assert [row["sparsity"] for row in rows] == [0.6, 0.5]
    assert "| 50 % | 60 % |" in accuracy.table(rows)
