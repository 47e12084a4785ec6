"""The scripts that `hf jobs uv run` starts: what they say they need, and runs against a Hub on this machine."""

import configparser
import re
import runpy
import sys

import huggingface_hub
import pytest
from packaging.requirements import Requirement
from support.hub_server import HubServer
from support.scripts import SCRIPTS, load_script

JOBS = sorted((SCRIPTS / "jobs").glob("*.py"))
# Of PEP 723, as it stands there.
METADATA = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_what_a_job_needs_is_this_package_with_extras_that_it_has(path):
    tomllib = pytest.importorskip("tomllib")
    (match,) = METADATA.finditer(path.read_text())
    assert match["type"] == "script"
    content = "".join(line.removeprefix("#").removeprefix(" ") for line in match["content"].splitlines(keepends=True))
    metadata = tomllib.loads(content)
    setup = configparser.ConfigParser()
    setup.read(SCRIPTS.parent / "setup.cfg")
    assert metadata["requires-python"] == setup["options"]["python_requires"]
    (requirement,) = (Requirement(each) for each in metadata["dependencies"])
    assert requirement.name == setup["metadata"]["name"]
    assert requirement.extras < set(setup["options.extras_require"])


@pytest.fixture
def hub(monkeypatch):
    constants = huggingface_hub.constants
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


def arguments(checkpoint, *more):
    return ["--model_name_or_path", str(checkpoint), "--num_grads", "16", "--max_eval_samples", "8", *more]


def test_every_sparsity_is_published(tiny_checkpoint, hub, tmp_path, capsys):
    job = load_script("jobs/prune.py")
    command = ["--hub_model_id", "user/vit", "--private", *arguments(tiny_checkpoint, "--sparsity", "0.5", "0.75")]
    assert job.main([*command, "--disable_tqdm"]) == 0, capsys.readouterr().err
    assert set(hub.repos) == {"user/vit-sparsity-0.5", "user/vit-sparsity-0.75"}
    for repo in hub.repos.values():
        assert repo.private
        assert {"README.md", "model.safetensors", "report.json"} < set(repo.branches["main"])


def test_a_budget_is_published_too(tiny_checkpoint, hub, tmp_path, capsys):
    """Its checkpoint is no sparsity-*: it was lost, and the job ended as if all were well."""
    job = load_script("jobs/prune.py")
    command = ["--hub_model_id", "user/vit", *arguments(tiny_checkpoint, "--budget", "flops=0.5")]
    assert job.main([*command, "--disable_tqdm"]) == 0, capsys.readouterr().err
    assert set(hub.repos) == {"user/vit-flops-0.5"}


def test_what_is_not_published_stays_and_the_others_are(tiny_checkpoint, hub, tmp_path, monkeypatch, capsys):
    job = load_script("jobs/prune.py")
    run = job.cap_hf
    monkeypatch.setattr(job, "cap_hf", lambda argv: 1 if argv[0] == "push" and "0.5" in argv[2] else run(argv))
    command = ["--hub_model_id", "user/vit", *arguments(tiny_checkpoint, "--sparsity", "0.5", "0.75")]
    command += ["--output_dir", str(tmp_path / "out"), "--disable_tqdm"]
    assert job.main(command) == 1
    assert f"not published: sparsity-0.5, in {tmp_path / 'out'}" in capsys.readouterr().err
    assert set(hub.repos) == {"user/vit-sparsity-0.75"}
    assert (tmp_path / "out" / "sparsity-0.5" / "model.safetensors").is_file()
    # A dry run publishes nothing of what lies there.
    assert job.main([*command, "--dry_run", "true"]) == 0
    assert set(hub.repos) == {"user/vit-sparsity-0.75"}


def test_nothing_is_pruned_that_could_not_be_published(tiny_checkpoint, hub, tmp_path, monkeypatch, capsys):
    job = load_script("jobs/prune.py")
    command = [*arguments(tiny_checkpoint, "--sparsity", "0.5"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert job.main(["--hub_model_id", "user/vit", *command]) == 1
    assert "the token is missing, expired or wrong" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert job.main(["--hub_model_id", "user/vit", *command]) == 1
    assert "may only read" in capsys.readouterr().err
    assert job.main(["--hub_model_id", "a/b/c", *command]) == 1
    assert "cannot be a repository" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert job.main(["--hub_model_id", "user/vit", *command, "--nope"]) == 1
    assert "unknown: --nope" in capsys.readouterr().err
    assert hub.repos == {}


def test_the_job_that_trains_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--nope"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS / "jobs" / "finetune.py"), run_name="__main__")
    assert caught.value.code == 1
    assert "cap-hf finetune: " in capsys.readouterr().err
