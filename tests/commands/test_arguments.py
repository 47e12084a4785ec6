"""Arguments from the command line and from files become checked dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from cap_hf import CAPConfig, CAPError
from cap_hf.collection.resources import Resources
from cap_hf.commands.arguments import (
    ModelArguments,
    arguments_from_file,
    beside,
    check_output,
    make_parser,
    parse,
)
from cap_hf.commands.main import main
from cap_hf.commands.prune_arguments import PruneArguments
from cap_hf.data.arguments import DataArguments

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
