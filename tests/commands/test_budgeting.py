"""`cap-hf prune --budget` as a user types it."""

import json

import pytest
from support.commands import prune
from support.launching import dense_checkpoint

from cap_hf import CAPConfig
from cap_hf.budget import Budget
from cap_hf.commands.budgeting import budget_columns, check_amounts
from cap_hf.commands.prune_arguments import PruneArguments, checkpoint_name
from cap_hf.hub.card import CardFacts


def test_budgets_give_checkpoints_a_table_a_report_and_a_card(tmp_path, capsys):
    dense = dense_checkpoint(tmp_path / "dense")
    assert prune(dense, tmp_path / "out", "--budget", "flops=0.25", "flops=0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["model", "sparsity", "%", "asked", "%", "flops"]
    assert lines[2].split()[2:4] == ["-", "-"]
    assert [line.split()[0] for line in lines[3:5]] == ["flops-0.5", "flops-0.25"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {record["phase"] for record in report["phases"]} >= {"prune flops=0.5", "evaluate flops=0.25"}
    for result, share, line in zip(report["results"], (0.5, 0.25), lines[3:5], strict=True):
        budget = result["pruning"]["budget"]
        assert (budget["kind"], budget["requested"], budget["predicted"]) == ("flops", share, None)
        assert 0.99 * share < budget["achieved"] <= share
        assert line.split()[2:4] == [f"{100 * share:.2f}", f"{100 * budget['achieved']:.2f}"]
        assert result["pruning"]["requested_sparsity"] is None
    card = CardFacts.gather(tmp_path / "out" / "flops-0.25", "user/vit").render().content
    assert " --budget flops=0.25" in card
    assert "--sparsity" not in card
    assert "It was pruned to 25.00 % of the targets' multiply-adds: " in card


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--budget", "flops=0.4", "--sparsity", "0.5"), "--budget takes the place of --sparsity: leave one of them"),
        (("--budget", "flops=0.4", "--num_recomputations", "1"), "leave out --num_recomputations"),
        (("--budget", "flops=0.4", "bytes=0.4"), "budgets of flops and bytes are for a run each"),
        (("--budget", "speed=2"), "budget 'speed' is none of flops, bytes, latency, latency-int8"),
        (("--budget", "flops=0.4", "--allocation", "2:4"), "allocation=2:4 says how much each target keeps"),
        (("--budget", "bytes=0.001"), "bytes=0.001 cannot be met: with every target 0"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_nothing_is_written(arguments, line, tmp_path, capsys):
    dense = dense_checkpoint(tmp_path / "dense")
    capsys.readouterr()
    assert prune(dense, tmp_path / "out", *arguments) == 1
    printed = capsys.readouterr().err.strip()
    assert line in printed
    assert len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_amounts_are_budgets_or_sparsities():
    assert check_amounts(PruneArguments(sparsity=[0.9, 0.5]), CAPConfig()) == [0.5, 0.9]
    found = check_amounts(PruneArguments(budget=["bytes=0.2", "bytes=0.25"]), CAPConfig())
    assert found == [Budget("bytes", 0.25), Budget("bytes", 0.2)]
    assert [checkpoint_name(each) for each in found] == ["bytes-0.25", "bytes-0.2"]


def test_a_latency_has_columns_for_what_was_predicted_and_how_exactly_it_was_measured():
    shares = {"requested": 0.5, "predicted": 0.49, "achieved": 0.503, "error": 0.002}
    columns = budget_columns([None, {"budget": {"kind": "latency"} | shares}])
    assert list(columns) == ["asked %", "predicted %", "latency %", "±"]
    assert list(columns.values()) == [[None, share] for share in shares.values()]
    assert budget_columns([None, {"budget": None}]) == {}
