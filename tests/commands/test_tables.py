"""Tables that commands print."""

import re

from cap_hf.commands.tables import percent, results_table, table

DENSE = {"top1": 0.8765, "top1_se": 0.033, "top5": 0.99, "loss": 0.25, "num_examples": 100}


def test_the_first_column_is_to_the_left_the_others_to_the_right():
    lines = table(["name", "n"], [["a", "100"], ["longer", "1"]]).splitlines()
    assert lines == ["name      n", "------  ---", "a       100", "longer    1"]


def test_results_have_a_line_each_with_the_drop_from_the_dense_model():
    sparse = {"top1": 0.8515, "top1_se": 0.0356, "top1_drop_se": 0.0123, "loss": 0.3, "loss_se": 0.0213}
    lines = results_table([("dense", None, DENSE), ("sparsity-0.5", 0.5, sparse)], DENSE).splitlines()
    assert lines[0].split() == ["model", "sparsity", "%", "top-1", "%", "drop", "top-5", "%", "loss"]
    assert lines[2].split() == ["dense", "-", "87.65", "±", "3.30", "-", "99.00", "0.2500"]
    assert re.split(" {2,}", lines[3]) == ["sparsity-0.5", "50.00", "85.15 ± 3.56", "2.50 ± 1.23", "-", "0.3000"]


def test_the_columns_are_what_was_measured():
    features = {"knn_top1": 0.5, "knn_top1_se": 0.01, "cosine": 0.9, "num_examples": 5}
    lines = results_table([("a", 0.5, features), ("b", 0.6, None)], features | {"knn_top1": 0.75}).splitlines()
    assert lines[0].split() == ["model", "sparsity", "%", "k-NN", "%", "drop", "cosine"]
    assert [line.split() for line in lines[2:]] == [
        ["a", "50.00", "50.00", "±", "1.00", "25.00", "0.9000"],
        ["b", "60.00", "-", "-", "-"],
    ]
    lines = results_table([("dense", None, None), ("sparsity-0.5", 0.5, None)], None).splitlines()
    assert [line.split() for line in lines[2:]] == [["dense", "-"], ["sparsity-0.5", "50.00"]]
    assert results_table([("a", None, features)], None).splitlines()[0].split() == ["model", "k-NN", "%", "cosine"]


def test_equal_metrics_are_no_drop_but_they_are_compared():
    assert results_table([("same", 0.0, dict(DENSE))], DENSE).splitlines()[2].split()[5] == "0.00"


def test_percent():
    assert (percent(0.875), percent(0.875, 1), percent(None)) == ("87.50", "87.5", "-")
