"""How a run is watched is checked before anything is loaded; a command is shown without tokens."""

import importlib.util

import pytest

from cap_hf import CAPError
from cap_hf.commands.main import main
from cap_hf.commands.watching import TRACKERS, as_typed, check_report, check_trackers


@pytest.fixture
def nothing_installed(monkeypatch):
    """No package that is only sometimes installed is there."""
    find = importlib.util.find_spec
    missing = {*TRACKERS.values(), "vl_convert"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))


def test_trackers_that_are_meant(monkeypatch):
    monkeypatch.setattr("cap_hf.commands.watching.check", lambda package, extra: None)
    assert check_trackers(["none"]) == []
    assert check_trackers(["wandb", "tensorboard", "wandb"]) == ["wandb", "tensorboard"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["aim"], "--report_to aim: the trackers are tensorboard, trackio, wandb, and none"),
        (["none", "wandb"], "--report_to none wandb: none stands alone"),
    ],
)
def test_what_is_no_tracker(names, message):
    with pytest.raises(CAPError) as error:
        check_trackers(names)
    assert str(error.value) == message


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_line(nothing_installed, name):
    with pytest.raises(CAPError) as error:
        check_trackers([name])
    assert str(error.value) == f"{name} is not installed: pip install 'cap_hf[{name}]'"


@pytest.mark.parametrize("command", ["prune", "finetune"])
@pytest.mark.parametrize(
    ("argument", "package", "extra"),
    [(["--report", "true"], "vl_convert", "report"), (["--report_to", "trackio"], "trackio", "trackio")],
)
def test_it_is_said_before_anything_is_loaded(
    nothing_installed, tmp_path, capsys, monkeypatch, command, argument, package, extra
):
    monkeypatch.setattr("cap_hf.commands.common.load_model", None)
    model, output = tmp_path / "model", tmp_path / "output"
    model.mkdir()
    arguments = ["--model_name_or_path", str(model), "--output_dir", str(output), *argument]
    assert main([command, *arguments, *(["--sparsity", "0.5"] if command == "prune" else [])]) == 1
    line = f"cap-hf {command}: {package} is not installed: pip install 'cap_hf[{extra}]'"
    assert capsys.readouterr().err.rstrip() == line
    assert not output.exists()


def test_the_page_needs_what_draws_it(nothing_installed):
    check_report(False)
    with pytest.raises(CAPError, match=r"pip install 'cap_hf\[report\]'"):
        check_report(True)


def test_a_command_is_shown_as_it_was_typed():
    assert as_typed("prune", ["--sparsity", "0.5", "--dataset_name", "my data"]) == (
        "cap-hf prune --sparsity 0.5 --dataset_name 'my data'"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--token", "secret"],
        ["--token=secret"],
        ["--hub_token", "secret"],
        ["--push_to_hub_token=secret"],
        ["--hub-token", "secret"],
        ["--push-to-hub-token=secret"],
        ["--model_name_or_path", "hf_" + "secret" * 4],
        ["--x=https://hf_" + "secret" * 4 + "@host"],
    ],
)
def test_tokens_are_not_shown(words):
    shown = as_typed("prune", [*words, "--sparsity", "0.5"])
    assert "secret" not in shown
    assert shown.endswith("--sparsity 0.5")
    assert words[0].partition("=")[0] in shown


def test_a_token_is_not_shown_however_it_was_named():
    words = ["--tok=s3cret", "--toke", "s3cret", "--name", "https://s3cret@host", "--sparsity", "0.5"]
    assert as_typed("prune", words, [None, "", "s3c", "s3cret"]) == (
        "cap-hf prune '--tok=***' --toke '***' --name 'https://***@host' --sparsity 0.5"
    )
    # The name itself stays one after which a token is hidden.
    assert "xyz" not in as_typed("prune", ["--token", "xyz"], ["token"])


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_a_token_that_was_read_is_hidden(monkeypatch, tmp_path, command):
    (tmp_path / "config.json").touch()
    arguments = ["--model_name_or_path", str(tmp_path), "--token", "s3cret", "--cache_dir", "/x/s3cret"]
    seen = []

    def stop(name, argv, secrets=()):
        seen.extend(secrets)
        raise CAPError(as_typed(name, argv, secrets))

    place = "prune" if command == "prune" else "training"
    monkeypatch.setattr(f"cap_hf.commands.{place}.as_typed", stop)
    more = ["--sparsity", "0.5"] if command == "prune" else ["--output_dir", str(tmp_path / "o")]
    assert main([command, *arguments, *more]) == 1
    assert "s3cret" in seen
