"""`cap-hf push`: what a dry run writes, and what it refuses. Pushing itself is in tests/hub/test_publish.py."""

import builtins

from support.checkpoints import make_checkpoint, make_custom_checkpoint

from cap_hf.commands.main import run as run_command


def test_dry_run_writes_what_would_be_pushed(tmp_path, capsys):
    make_checkpoint(tmp_path / "m")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "out"), "--dry_run", "true"]
    assert run_command("push", [*command, "--hub_model_id", "user/x"]) == 0
    assert (tmp_path / "out" / "README.md").is_file()
    assert "is what would be pushed to user/x" in capsys.readouterr().out
    assert run_command("push", [*command, "--hub_model_id", "user/x"]) == 1
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert run_command("push", command) == 1
    assert capsys.readouterr().err == "cap-hf push: say where to: --hub_model_id user/name\n"


def test_push_runs_code_only_if_it_is_trusted_and_publishes_it(tmp_path, monkeypatch, capsys):
    make_custom_checkpoint(tmp_path / "m")
    monkeypatch.setattr(builtins, "input", None)  # nobody can be asked
    command = ["--model_name_or_path", str(tmp_path / "m"), "--hub_model_id", "a/b", "--dry_run", "true"]
    command += ["--output_dir", str(tmp_path / "out")]
    assert run_command("push", command) == 1
    assert "pass --trust_remote_code true" in capsys.readouterr().err
    assert run_command("push", [*command, "--trust_remote_code", "true"]) == 0
    assert (tmp_path / "out" / "own.py").read_text() == (tmp_path / "m" / "own.py").read_text()
