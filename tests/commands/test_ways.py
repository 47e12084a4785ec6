"""Arguments of which a run follows one: what is typed takes the place of what a file says in another way."""

from dataclasses import dataclass, fields

import pytest

from cap_hf.commands import prune as prune_command
from cap_hf.commands.arguments import parse
from cap_hf.commands.main import main
from cap_hf.commands.search_arguments import SearchArguments
from cap_hf.commands.ways import PATTERN, WAYS
from cap_hf.recovery.training_arguments import SparseTrainingArguments


@dataclass
class Ways:
    """Arguments of which a run follows one."""

    sparsity: list[str] | None = None
    budget: str | None = None
    max_accuracy_drop: float | None = None
    sparsity_step: float = 0.01
    num_recomputations: int = 0
    allocation: str = "global"
    num_train_epochs: float = 3.0
    max_steps: int = -1


@pytest.mark.parametrize(
    ("text", "typed", "expected"),
    [
        ("sparsity: 0.9", "--budget flops=0.4", {"budget": "flops=0.4"}),
        ("sparsity: 0.9", "--budget=flops=0.4", {"budget": "flops=0.4"}),
        ("sparsity: [0.5, 0.9]\nnum_recomputations: 2", "--max_accuracy_drop 0.01", {"max_accuracy_drop": 0.01}),
        ("max-accuracy-drop: 0.01\nsparsity-step: 0.1", "--sparsity 0.9", {"sparsity": ["0.9"]}),
        (
            "max_accuracy_drop: 0.02\nbudget: bytes=0.3",
            "--max-accuracy-drop 0.01 --sparsity_step 0.1",
            {"max_accuracy_drop": 0.01, "sparsity_step": 0.1},
        ),
        ("sparsity: 0.9", "--allocation 2:4", {"allocation": "2:4"}),
        ("budget: bytes=0.3", "--allocation=2:4", {"allocation": "2:4"}),
        ("sparsity: 0.9", "--allocation uniform", {"sparsity": ["0.9"], "allocation": "uniform"}),
        ("allocation: 2:4", "--sparsity 0.9", {"sparsity": ["0.9"]}),
        ("allocation: 2:4", "--budget bytes=0.3", {"budget": "bytes=0.3"}),
        # 2:4 is half of the weights, which may be said too.
        ("allocation: 2:4", "--sparsity 0.5", {"sparsity": ["0.5"], "allocation": "2:4"}),
        (
            "sparsity: 0.5\nnum_recomputations: 2",
            "--sparsity 0.9",
            {"sparsity": ["0.9"], "num_recomputations": 2},
        ),
        ("max_steps: 5\nsparsity: 0.5", "--num_train_epochs 2", {"sparsity": ["0.5"], "num_train_epochs": 2.0}),
        # What is in one place is left for the checks, which name both.
        (
            "sparsity: 0.9\nbudget: bytes=0.3",
            "--max_steps 2",
            {"sparsity": ["0.9"], "budget": "bytes=0.3", "max_steps": 2},
        ),
        (
            "max_steps: 2",
            "--sparsity 0.9 --budget bytes=0.3",
            {"sparsity": ["0.9"], "budget": "bytes=0.3", "max_steps": 2},
        ),
    ],
)
def test_what_is_typed_takes_the_place_of_another_way_in_a_file(tmp_path, text, typed, expected):
    (tmp_path / "run.yaml").write_text(text)
    (parsed,) = parse([str(tmp_path / "run.yaml"), *typed.split()], "try", "", Ways)
    assert parsed == Ways(**expected)


def test_ways_are_arguments_of_commands():
    """A new name of an argument would leave the old one in the table without effect."""
    known = {each.name for kind in (*prune_command.KINDS, SparseTrainingArguments) for each in fields(kind)}
    named = {name for ways in WAYS for way, companions in ways.items() for name in (way, *companions)}
    assert named - known == {PATTERN}
    # Whatever a search needs goes with it.
    searching = {each.name for each in fields(SearchArguments)}
    assert searching == {"max_accuracy_drop", *WAYS[0]["max_accuracy_drop"]}


@pytest.mark.parametrize(
    ("text", "typed", "message"),
    [
        ("sparsity: 0.9", ["--budget", "flops=0.4"], None),
        ("sparsity: 0.9", ["--sparsity", "0.5", "--budget", "flops=0.4"], "leave one of them out"),
        ("sparsity: 0.9\nbudget: flops=0.4", [], "leave one of them out"),
    ],
)
def test_a_typed_budget_goes_before_the_sparsity_of_a_file(tiny_checkpoint, tmp_path, capsys, text, typed, message):
    file, output = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(f"model_name_or_path: {tiny_checkpoint}\nmethod: magnitude\ndo_eval: false\n{text}\n")
    code = main(["prune", str(file), *typed, "--output_dir", str(output)])
    assert code == (message is not None)
    if message is None:
        assert [path.name for path in output.iterdir() if path.is_dir()] == ["flops-0.4"]
    else:
        assert message in capsys.readouterr().err
