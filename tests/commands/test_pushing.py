"""`cap-hf finetune --push_to_hub`: the Trainer publishes nothing, and what is published says nothing private."""

import shutil

import pytest
from support.finetuning import finetune
from transformers import Trainer

from cap_hf.commands import pushing
from cap_hf.errors import CAPError
from cap_hf.hub import publish


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for the Hub: what is uploaded to it lies in a folder per repository."""
    folder = tmp_path / "hub"

    def upload(ready, repo_id, *arguments):
        shutil.copytree(ready, folder / repo_id)
        return f"https://hub/{repo_id}"

    def never(*_, **__):
        raise AssertionError("the Trainer pushes")

    monkeypatch.setattr(pushing, "open_repository", lambda repo_id, *_: repo_id if "/" in repo_id else f"me/{repo_id}")
    monkeypatch.setattr(publish, "upload_folder", upload)
    for name in ("push_to_hub", "_push_from_checkpoint", "init_hf_repo"):
        monkeypatch.setattr(Trainer, name, never)
    return folder


def test_the_recovered_checkpoint_alone_is_published(tmp_path, folders, hub, monkeypatch, capsys):
    monkeypatch.setattr("socket.gethostname", lambda: "lab-7.example.org")
    arguments = ("--teacher_model_name_or_path", str(folders[1]), "--push_to_hub", "True", "--save_steps", "1")
    secret = ("--hub_token", "hf_abcdefghijklmnopqrst", "--run_name", f"{tmp_path}/lab-7")
    assert finetune(folders[0], tmp_path / "out", *arguments, *secret) == 0
    assert "me/out was pushed: https://hub/me/out" in capsys.readouterr().out
    published = {path.name: path.read_bytes() for path in (hub / "me" / "out").iterdir()}
    assert set(published) == {
        *("README.md", "cap_config.json", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("report.json", "sparsity.png"),
    }
    for private in (str(tmp_path), str(folders[0].parent), "lab-7", "hf_abcdefghijklmnopqrst"):
        assert not [name for name, content in published.items() if private.encode() in content], private
    assert (tmp_path / "out-training" / "checkpoint-4" / "training_args.bin").is_file()
    # The report here still says it all.
    assert str(folders[0]) in (tmp_path / "out" / "report.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hub_strategy", "all_checkpoints"), "--hub_strategy all_checkpoints would publish the Trainer's checkpoi"),
        (
            ("--hub_strategy", "end", "--hub_always_push", "True"),
            "--hub_always_push has nothing to push while it trains",
        ),
        (("--hub_model_id", "a/b/c"), "--hub_model_id 'a/b/c' cannot be a repository: user/name is"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_training(tmp_path, folders, capsys, arguments, message):
    assert finetune(folders[0], tmp_path / "out", "--push_to_hub", "True", *arguments) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("cap-hf finetune:")]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_hub_that_refuses_leaves_the_checkpoint(tmp_path, folders, hub, monkeypatch, capsys):
    def refuse(*_, **__):
        raise CAPError("me/out was not pushed, nothing was published: the server is on fire")

    monkeypatch.setattr(publish, "upload_folder", refuse)
    assert finetune(folders[0], tmp_path / "out", "--push_to_hub", "True", "--max_steps", "1") == 1
    assert f"the checkpoint is in {tmp_path / 'out'}, but was not pushed: me/out was not" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()
