"""Push and load against a local server, with the real huggingface_hub and transformers in other processes."""

import json
import subprocess

import pytest
from support.checkpoints import PYTHON, clean_environment, make_checkpoint
from support.hub_server import Fault, HubServer

from cap_hf import CAPError
from cap_hf.commands.main import run as run_command

TOKEN = "hf_writer"


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


def run(script, home, server, token=TOKEN, timeout=200, **variables):
    """A Python process of its own, with an empty cache, that knows this hub only."""
    environment = clean_environment(home, HF_ENDPOINT=server.url, **variables)
    if token:
        environment["HF_TOKEN"] = token
    done = subprocess.run(
        [PYTHON, "-c", script], env=environment, capture_output=True, text=True, timeout=timeout, cwd=home
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done


def test_push_then_load_by_name_in_another_process(server, tmp_path):
    for name in ("push", "load", "plain"):
        (tmp_path / name).mkdir()
    make_checkpoint(tmp_path / "m")
    done = run(
        f"""
from cap_hf.commands.main import main
for name, extra in (("plain", []), ("compressed", ["--compressed", "true", "--private", "true"])):
    code = main(["push", "--model_name_or_path", {str(tmp_path / "m")!r}, "--hub_model_id", "user/" + name,
                 "--commit_message", "first try", "--license", "mit", *extra])
    assert code == 0
""",
        tmp_path / "push",
        server,
    )
    assert TOKEN not in done.stdout + done.stderr
    for name, repo in server.repos.items():
        assert [commit["summary"] for commit in repo.commits] == ["first try"]
        files = repo.branches["main"]
        assert {"README.md", "sparsity.png", "report.json", "preprocessor_config.json", "config.json"} < set(files)
        assert ("model.cap.safetensors" in files) == (name == "user/compressed")
        assert all(TOKEN.encode() not in data for data in files.values())
        # Before the commit nothing was there, after it everything.
        seen = {sum(path.startswith(name + "/") for path in visible) for visible in server.visible}
        assert seen == {0, len(files)}
    assert server.repos["user/compressed"].private
    assert not any(TOKEN in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())

    run(
        f"""
import torch, cap_hf
from transformers import AutoModelForImageClassification, pipeline
from support.checkpoints import assert_same_weights
expected = AutoModelForImageClassification.from_pretrained({str(tmp_path / "m")!r})
for name in ("user/plain", "user/compressed"):
    assert_same_weights(AutoModelForImageClassification.from_pretrained(name), expected)
    loaded = AutoModelForImageClassification.from_pretrained(name, dtype="bfloat16", device_map="auto")
    assert loaded.dtype == torch.bfloat16
from PIL import Image
assert len(pipeline("image-classification", "user/compressed")(Image.new("RGB", (20, 20)))) == 3
from cap_hf.commands.main import main
assert main(["inspect", "--model_name_or_path", "user/compressed", "--output_dir", "inspected"]) == 0
assert main(["compress", "--model_name_or_path", "user/plain", "--output_dir", "small"]) == 0
assert_same_weights(AutoModelForImageClassification.from_pretrained("small"), expected)
""",
        tmp_path / "load",
        server,
    )
    report = json.loads((tmp_path / "load" / "inspected" / "inspect.json").read_text())
    assert report["compressed"]
    assert report["layers_unlike_report"] == []
    assert report["compressed_bytes"] < report["file_bytes"] < report["dense_bytes"]

    run(
        """
from transformers import AutoModelForImageClassification, pipeline
from PIL import Image
assert len(pipeline("image-classification", "user/plain")(Image.new("RGB", (20, 20)))) == 3
try:
    AutoModelForImageClassification.from_pretrained("user/compressed")
except ValueError as error:
    assert "import cap_hf" in str(error)
else:
    raise SystemExit("it was loaded")
""",
        tmp_path / "plain",
        server,
    )


def test_branches_pull_requests_faults_and_rights(server, tmp_path):
    """One process, one line a scenario; the server plays the faults that are ordered through its own route."""
    (tmp_path / "home").mkdir()
    make_checkpoint(tmp_path / "m")
    server.faults += [
        Fault("POST", "repos/create", 500),
        Fault("POST", "retry/preupload", 500),
        Fault("PUT", "/upload/", "drop"),
        Fault("POST", "retry/commit", 502),
        Fault("POST", "broken/commit", 500, times=99),
        Fault("POST", "pull2/commit", 500, times=99),
    ]
    done = run(
        f"""
import json, os
import cap_hf
from cap_hf import CAPError, push_to_hub
results = {{}}
def push(label, name, **kwargs):
    try:
        results[label] = push_to_hub({str(tmp_path / "m")!r}, "user/" + name, **kwargs)
    except CAPError as error:
        results[label] = "CAPError: " + str(error)
push("retry", "retry")
push("compressed over plain", "retry", compressed=True, commit_message="smaller")
push("branch", "retry", revision="v2")
push("pull", "retry", create_pr=True, commit_message="as a pull request")
push("broken", "broken")
push("pull2", "pull2", create_pr=True)
push("expired", "retry", token="hf_expired")
push("no rights", "retry", token="hf_reader")
push("no rights to create", "fresh", token="hf_reader")
push("public", "retry", private=True)
print(json.dumps(results))
""",
        tmp_path / "home",
        server,
    )
    results = json.loads(done.stdout.splitlines()[-1])
    for label, said in results.items():
        assert "\n" not in said, label
        assert "hf_" not in said.replace("cap_hf", "").replace("hf_hub", ""), said
    repo = server.repos["user/retry"]
    assert results["retry"].startswith(f"{server.url}/user/retry/commit/")
    assert [commit["summary"] for commit in repo.commits] == [
        "Upload a model pruned with cap_hf",
        "smaller",
        "Upload a model pruned with cap_hf",
        "as a pull request",
    ]
    # The plain weights went in the commit that brought the compressed ones.
    assert "model.cap.safetensors" in repo.branches["main"]
    assert "model.safetensors" not in repo.branches["main"]
    assert "model.safetensors" in repo.branches["v2"]
    assert results["pull"] == f"{server.url}/user/retry/discussions/1"
    assert "model.safetensors" in repo.branches["refs/pr/1"]
    for label, words in {
        "broken": ("nothing was published", "on fire", "try again later"),
        "pull2": ("nothing was published", "on fire"),
        "expired": ("expired", "hf auth login"),
        "no rights": ("rights", "--hub_model_id"),
        "no rights to create": ("rights", "--hub_model_id"),
        "public": ("exists and is public",),
    }.items():
        assert results[label].startswith("CAPError: "), label
        assert all(word in results[label] for word in words), results[label]
    assert server.repos["user/broken"].branches["main"] == {}
    assert sum(request == "POST /api/models/user/pull2/commit/main" for request in server.requests) == 1
    sizes = {sum(path.startswith("user/retry/") for path in visible) for visible in server.visible}
    assert len(sizes) == 2  # none of the files, or all


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


def test_compress_and_inspect_commands(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "m")
    arguments = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir"]
    assert run_command("compress", [*arguments, str(tmp_path / "c")]) == 0
    assert "bytes of weights" in capsys.readouterr().out
    assert run_command("compress", [*arguments, str(tmp_path / "c")]) == 1
    assert "exists" in capsys.readouterr().err
    assert run_command("inspect", ["--model_name_or_path", str(tmp_path / "c"), "--output_dir", str(tmp_path)]) == 0
    assert "those of its report" in capsys.readouterr().out
    # As many zeros as before, one of them in another place.
    weights = model.vit.layers[1].mlp.fc2.weight.detach().view(-1)
    zero, other = int((weights == 0).nonzero()[0]), int((weights != 0).nonzero()[0])
    weights[zero], weights[other] = weights[other].clone(), 0
    model.save_pretrained(tmp_path / "m")
    assert run_command("inspect", [*arguments, str(tmp_path)]) == 0
    assert "NOT those of its report in vit.layers.1.mlp.fc2\n" in capsys.readouterr().out
    assert run_command("push", [*arguments, str(tmp_path / "p"), "--hub_model_id", "a/b", "--dry_run"]) == 1
    assert "is not about these weights (vit.layers.1.mlp.fc2 has other zeros)" in capsys.readouterr().err
    assert run_command("compress", ["--model_name_or_path", "no/where", "--output_dir", str(tmp_path / "d")]) == 1
    assert capsys.readouterr().err.startswith("cap-hf compress: no/where is no folder and cannot be downloaded: ")


def test_compress_tells_of_zeros_with_a_sign(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "m")
    weight = model.vit.layers[0].mlp.fc1.weight
    zeros = (weight == 0).nonzero()
    weight.data[zeros[:7, 0], zeros[:7, 1]] = -0.0
    model.save_pretrained(tmp_path / "m")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 0
    assert "\n7 zeros are -0.0" in capsys.readouterr().out
    weight.data[weight == 0] = 0
    model.save_pretrained(tmp_path / "m")
    assert run_command("compress", [*command, "--overwrite_output_dir", "true"]) == 0
    assert "-0.0" not in capsys.readouterr().out


def test_errors_are_value_errors():
    assert issubclass(CAPError, ValueError)
