"""Arguments from the command line and from files become checked dataclasses."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from cap_hf import CAPConfig, CAPError
from cap_hf.collection.resources import Resources
from cap_hf.commands import prune as prune_command
from cap_hf.commands.arguments import (
    PATTERN,
    WAYS,
    ModelArguments,
    arguments_from_file,
    beside,
    check_output,
    make_parser,
    parse,
)
from cap_hf.commands.main import main
from cap_hf.commands.prune_arguments import PruneArguments
from cap_hf.commands.search_arguments import SearchArguments
from cap_hf.data.arguments import DataArguments
from cap_hf.recovery.training_arguments import SparseTrainingArguments

KINDS = (ModelArguments, DataArguments, PruneArguments, CAPConfig, Resources)


@dataclass
class Numbers:
    """Some of each type."""

    values: list[float] = field(default_factory=list)
    limit: int | None = None
    flag: bool = True
    facts: str = ""


def test_the_parser_is_transformers_own():
    arguments = ["--model_name_or_path", "user/x", "--sparsity", "0.5", "0.9", "--no_do_eval", "--num-grads", "8"]
    expected = HfArgumentParser(KINDS).parse_args_into_dataclasses(arguments)
    assert make_parser(KINDS, "prune", "").parse_args_into_dataclasses(arguments) == expected
    assert parse(arguments, "prune", "", *KINDS) == expected


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--limit", "x"], "argument --limit: invalid int value: 'x'"),
        (["--nope", "1", "--flag", "false"], "unknown: --nope 1; cap-hf try --help shows the arguments"),
        (["--values", "0.5", "half"], "argument --values: invalid float value: 'half'"),
        (["--flag", "perhaps"], "got perhaps but expected one of yes/no"),
        (["--lim", "3"], "--lim is no whole name: write --limit"),
        (["--fla=s3cret"], "--fla is no whole name: write --flag"),
        (["a.yaml", "b.yaml"], "'b.yaml' stands beside a.yaml without a name, as in --output_dir b.yaml"),
        (["a.yaml", "--limit", "4"], "a.yaml cannot be read: "),
        (["a.txt"], "'a.txt' belongs to no argument: "),
        (["a.toml", "--limit", "4"], "a file of arguments ends in .yaml, .yml, .json"),
    ],
)
def test_what_is_wrong_is_said_alone(arguments, line, capsys):
    with pytest.raises(CAPError) as caught:
        parse(arguments, "try", "", Numbers)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_a_file_stands_for_a_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("values: [0.5, 0.9]\nlimit: null\nflag: false\nfacts: {a: 1}\n")
    expected = ["--values", "0.5", "0.9", "--flag=False", '--facts={"a": 1}']
    assert arguments_from_file(str(tmp_path / "run.yaml"), [Numbers]) == expected
    (parsed,) = parse([str(tmp_path / "run.yaml")], "try", "", Numbers)
    assert parsed == Numbers([0.5, 0.9], flag=False, facts='{"a": 1}')


def test_numbers_in_a_file_are_decimal(tmp_path):
    """To the base of 60, as YAML 1.1 has it, 2:4 is 124."""
    (tmp_path / "run.yaml").write_text("facts: {a: 2:4, b: 12, c: 0.5}\nvalues: [1:4]\n")
    assert arguments_from_file(str(tmp_path / "run.yaml"), [Numbers]) == [
        '--facts={"a": "2:4", "b": 12, "c": 0.5}',
        "--values",
        "1:4",
    ]


def test_what_stands_beside_a_file_goes_before_it(tmp_path):
    file = str(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("values: [0.5, 0.9]\nlimit: 3\nflag: true\nfacts: x\n")
    (parsed,) = parse([file, "--values", "0.1", "--no_flag", "--limit=4"], "try", "", Numbers)
    assert parsed == Numbers([0.1], limit=4, flag=False, facts="x")
    (parsed,) = parse([file, "--flag", "false"], "try", "", Numbers)
    assert parsed == Numbers([0.5, 0.9], limit=3, flag=False, facts="x")
    with pytest.raises(CAPError, match="run.yaml comes too late: a file of arguments stands before all others"):
        parse(["--model_revision", "x", file], "try", "", ModelArguments)
    with pytest.raises(CAPError, match="unknown: --nope"):
        parse([file, "--nope"], "try", "", Numbers)


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


def test_an_output_that_may_not_be_replaced_is_refused(tmp_path):
    (tmp_path / "file").touch()
    check_output(tmp_path / "new", False)
    check_output(tmp_path, True)
    with pytest.raises(CAPError, match="pass --overwrite_output_dir"):
        check_output(tmp_path, False)
    with pytest.raises(CAPError, match="file is a file"):
        check_output(tmp_path / "file" / "below", True)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(CAPError, match="round is a link that leads back to itself: remove it"):
        check_output(tmp_path / "round" / "below", True)
    (tmp_path / "new disk" / "lost+found").mkdir(parents=True)
    check_output(tmp_path / "new disk", False)


def test_what_a_run_keeps_lies_beside_its_output_or_in_it(tmp_path, monkeypatch):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    monkeypatch.chdir(tmp_path)
    for output in ("disk/out", "link", tmp_path / "disk" / "out"):
        assert beside(output, "training") == tmp_path / "disk" / "out-training"
    assert beside("disk/new", "training") == tmp_path / "disk" / "new-training"
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "disk" / "out")
        inside = beside("link", "training")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, _: Path(path) != tmp_path / "disk")
        assert beside("link", "training") == inside == tmp_path / "disk" / "out" / "training"
        # There it is no content that has to be replaced.
        inside.mkdir()
        check_output("link", False, inside)
        with pytest.raises(CAPError, match="pass --overwrite_output_dir"):
            check_output("link", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity: [0.5", "cannot be read: while parsing"),
        ("- 0.5", "must hold names and values"),
        ("sparsity: half", "sparsity 'half' is no number"),
        ("sparsity: 0.5\nspeed: 3", "unknown: --speed=3"),
        ("sparsity: 0.5\ndamp: high", "invalid float value: 'high'"),
        ("--sparsity: 0.5", "has '--sparsity': names in a file have no dashes before them, 'sparsity'"),
        ("prune: {sparsity: 0.5}", "has sparsity below 'prune', which is no argument"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tiny_checkpoint, tmp_path, capsys, text, message):
    model = f"model_name_or_path: {tiny_checkpoint}\n" if ":" in text else ""
    (tmp_path / "run.yaml").write_text(f"{model}{text}\n")
    assert main(["prune", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert main(["prune", str(tmp_path / "nowhere.yaml")]) == 1
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err
