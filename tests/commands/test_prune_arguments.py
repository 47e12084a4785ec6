"""The arguments of `cap-hf prune`, checked before anything is loaded."""

import json

import pytest
from support.commands import prune
from support.launching import dense_checkpoint

from cap_hf import CAPConfig
from cap_hf.commands.prune_arguments import (
    PruneArguments,
    check_sparsities,
    check_state,
    checkpoint_name,
    state_folder,
)
from cap_hf.errors import CAPError
from cap_hf.hub.card import CardFacts


def test_sparsities_come_in_order_and_once():
    assert check_sparsities([0.9, 0.5, 0.5 + 1e-14], CAPConfig()) == [0.5, 0.9]
    assert check_sparsities(None, CAPConfig(allocation="2:4")) == [0.5]
    assert [checkpoint_name(each) for each in (0.5, 0.123456)] == ["sparsity-0.5", "sparsity-0.123456"]


def test_a_gpu_to_plan_for_makes_it_a_dry_run():
    assert PruneArguments(plan_for="gpu=H100,count=8").dry_run
    assert not PruneArguments().dry_run
    with pytest.raises(CAPError, match="gpu=H9 is none of"):
        PruneArguments(plan_for="gpu=H9")


def test_the_state_of_a_collection_goes_with_a_single_one(tmp_path):
    check_state(PruneArguments(num_recomputations=2))
    check_state(PruneArguments(checkpoint_every=8))
    for changes, line in (
        ({"resume": True}, "--resume goes with --checkpoint_every"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"checkpoint_every": 8, "num_recomputations": 1}, "leave out --num_recomputations"),
        ({"checkpoint_every": 8, "resume": True, "output_dir": str(tmp_path / "out")}, "is not there"),
    ):
        with pytest.raises(CAPError, match=line):
            check_state(PruneArguments(**changes))
    assert state_folder(PruneArguments(output_dir=str(tmp_path / "out"))) == tmp_path / "out-collection"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--sparsity", "0.5", "--num_recomputations", "-1"), "num_recomputations=-1 must be at least 0"),
        (("--allocation", "2:4", "--num_recomputations", "1"), "2:4 has no sparsities on the way to it"),
        (("--sparsity", "0.5", "--method", "magnitude", "--num_recomputations", "1"), "collects nothing that could be"),
        (("--sparsity", "0.5", "--method", "wanda", "--plan_for", "gpu=H100"), "a plan on paper is for cap alone"),
        (("--sparsity", "0.5", "--plan_for", "gpu=H100,memory=1MB"), "leaves nothing of the memory that there is"),
    ],
)
def test_what_makes_no_sense_is_one_line(arguments, line, tmp_path, capsys):
    dense = dense_checkpoint(tmp_path / "dense")
    capsys.readouterr()
    prune(dense, tmp_path / "out", *arguments)
    printed = "".join(capsys.readouterr()).strip()
    assert line in printed
    assert len(printed.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_prune_in_steps_is_that_of_commands_in_a_row(tmp_path):
    dense = dense_checkpoint(tmp_path / "dense")
    assert prune(dense, tmp_path / "steps", "--sparsity", "0.5", "0.75", "--num_recomputations", "1") == 0
    assert prune(dense, tmp_path / "first", "--sparsity", "0.5") == 0
    assert prune(tmp_path / "first" / "sparsity-0.5", tmp_path / "second", "--sparsity", "0.75") == 0
    weights = [tmp_path / name / "sparsity-0.75" / "model.safetensors" for name in ("steps", "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    report = json.loads((tmp_path / "steps" / "report.json").read_text())
    assert [each["steps"] for each in report["results"]] == [[0.5], [0.5, 0.75]]
    assert report["config"]["fisher_loss"] == "labels"
    assert [each["pruning"]["requested_sparsity"] for each in report["results"]] == [0.5, 0.75]
    content = CardFacts.gather(tmp_path / "steps" / "sparsity-0.75", "user/vit").render().content
    assert " --sparsity 0.75 --num_recomputations 1" in content
    assert "It was pruned in steps, to 50.00, 75.00 %, each of which begins" in content
    assert "what the layers of the model before each step make of" in content
    assert "--num_recomputations" not in CardFacts.gather(weights[1].parent, "user/vit").render().content
