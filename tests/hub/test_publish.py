"""Push and load against a local server, with the real huggingface_hub and transformers in other processes."""

import builtins
import json
import os
import shutil
import subprocess

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from support.checkpoints import (
    PYTHON,
    assert_same_weights,
    clean_environment,
    make_checkpoint,
    make_custom_checkpoint,
)
from support.hub_server import Fault, HubServer
from transformers import AutoModelForImageClassification

from cap_hf import CAPError
from cap_hf.checkpoints.weights import find_weight_files
from cap_hf.commands.main import run as run_command
from cap_hf.hub.publish import prepare_folder

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


def test_prepared_folder_is_complete(tmp_path):
    make_checkpoint(tmp_path / "m")
    prepare_folder(tmp_path / "m", tmp_path / "out", "user/small-vit", compressed=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "cap_config.json",
        "config.json",
        "model.cap.safetensors",
        "preprocessor_config.json",
        "report.json",
        "sparsity.png",
    ]
    assert (tmp_path / "out" / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "m" / "model.safetensors").is_file()
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(CAPError, match=r"has no preprocessor_config\.json"):
        prepare_folder(tmp_path / "m", tmp_path / "other", "user/small-vit")
    assert not (tmp_path / "other").exists()
    for name in ("a/b/c", "x y/z", "user/name\nx", ""):
        with pytest.raises(CAPError, match="cannot be a repository"):
            prepare_folder(tmp_path / "m", tmp_path / "other", name)


def test_nothing_outside_the_folder_is_published(tmp_path):
    """A folder that somebody received: its links lead to files of whoever pushes it."""
    secret = tmp_path / "id_rsa"
    secret.write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
    (tmp_path / "secret.json").write_text('{"token": "x"}')
    for name, target in {
        "preprocessor_config.json": secret,
        "report.json": tmp_path / "secret.json",
        "cap_config.json": "../secret.json",
        "config.json": tmp_path / "m" / ".." / "secret.json",
        "model.safetensors": secret,
    }.items():
        make_checkpoint(tmp_path / "m")
        (tmp_path / "m" / name).unlink()
        (tmp_path / "m" / name).symlink_to(target)
        for compressed in (False, True):
            with pytest.raises(CAPError, match=f"{name} is a link out of its folder"):
                prepare_folder(tmp_path / "m", tmp_path / "out", "user/x", compressed)
    (tmp_path / "m" / "model.safetensors").unlink()
    make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text(secret.read_text())
    with pytest.raises(CAPError, match=r"preprocessor_config\.json cannot be read"):
        prepare_folder(tmp_path / "m", tmp_path / "out", "user/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["id_rsa", "m", "secret.json"]


def test_a_snapshot_of_the_cache_is_published_through_its_links(tmp_path):
    make_checkpoint(tmp_path / "m")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "m").iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    prepare_folder(snapshot, tmp_path / "out", "user/x")
    for path in (tmp_path / "m").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert not (tmp_path / "out" / path.name).is_symlink()


def test_shards_are_published_with_their_index(tmp_path):
    model = make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    facts = prepare_folder(tmp_path / "m", tmp_path / "plain", "user/x")
    small = prepare_folder(tmp_path / "m", tmp_path / "compressed", "user/x", compressed=True)
    assert (facts.compressed, small.compressed) == (False, True)
    assert small.file_bytes < facts.file_bytes
    for name, facts_ in (("plain", facts), ("compressed", small)):
        files = find_weight_files(tmp_path / name)
        assert files.index.is_file()
        assert files.num_bytes == facts_.file_bytes
        assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / name), model)
    assert not list((tmp_path / "compressed").glob("model-*"))


def test_push_runs_code_only_if_it_is_trusted_and_publishes_it(tmp_path, monkeypatch, capsys):
    make_custom_checkpoint(tmp_path / "m")
    monkeypatch.setattr(builtins, "input", None)  # nobody can be asked
    command = ["--model_name_or_path", str(tmp_path / "m"), "--hub_model_id", "a/b", "--dry_run", "true"]
    command += ["--output_dir", str(tmp_path / "out")]
    assert run_command("push", command) == 1
    assert "pass --trust_remote_code true" in capsys.readouterr().err
    assert run_command("push", [*command, "--trust_remote_code", "true"]) == 0
    assert (tmp_path / "out" / "own.py").read_text() == (tmp_path / "m" / "own.py").read_text()


def flip_a_bit(path):
    """The lowest one of the first value: the values lie first, what says where they go behind them."""
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    path.write_bytes(data)


def test_inspect_and_push_find_a_flipped_bit(tmp_path, capsys):
    make_checkpoint(tmp_path / "m", compressed=True)
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "out")]
    assert run_command("inspect", command) == 0
    assert "The bytes of every stored tensor are those that were written\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["digests_checked"]
    flip_a_bit(tmp_path / "m" / "model.cap.safetensors")
    for name, extra in (("inspect", []), ("push", ["--hub_model_id", "a/b", "--dry_run", "--overwrite_output_dir"])):
        assert run_command(name, [*command, *extra]) == 1
        assert "than were written: the file is damaged" in capsys.readouterr().err


def test_inspect_says_that_a_file_of_an_earlier_version_has_no_digests(tmp_path, capsys):
    make_checkpoint(tmp_path / "m", compressed=True)
    path = tmp_path / "m" / "model.cap.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})
    assert run_command("inspect", ["--model_name_or_path", str(path.parent), "--output_dir", str(tmp_path)]) == 0
    assert "The files have no digests" in capsys.readouterr().out


# What was a traceback, or was taken for what it said, before it was looked at: file, place, value.
MUTATIONS = [
    ("report.json", [], [1]),
    ("report.json", ["seed"], "# x"),
    ("report.json", ["data"], "x"),
    ("report.json", ["data", "dataset_name"], 7),
    ("report.json", ["model_name_or_path"], "x" * 5000 + "/y"),
    ("report.json", ["model_name_or_path"], ["x"]),
    ("report.json", ["versions"], [1]),
    ("report.json", ["sparse", "num_examples"], "8"),
    ("report.json", ["sparse", "top1"], 10**400),
    ("report.json", ["pruning"], [1]),
    ("report.json", ["pruning", "layers", 0], None),
    ("report.json", ["pruning", "layers", 0, "name"], [1]),
    ("cap_config.json", [], 5),
    ("cap_config.json", ["damp"], "x"),
    ("cap_config.json", ["exclude"], [1]),
    ("cap_config.json", ["include"], 5),
    ("config.json", [], "x"),
    ("config.json", ["num_hidden_layers"], 10**9),
    ("config.json", ["hidden_size"], 10**7),
    ("config.json", ["hidden_size"], -1),
    ("config.json", ["id2label"], 5),
    ("config.json", ["auto_map"], 5),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_checkpoint(folder / "m")
    return folder / "m"


@pytest.mark.parametrize(("name", "place", "value"), MUTATIONS)
def test_no_content_of_a_file_ends_in_a_traceback(whole, name, place, value, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "m")
    root = {"root": json.loads((tmp_path / "m" / name).read_text())}
    parent = root
    for key in ["root", *place][:-1]:
        parent = parent[key]
    parent[["root", *place][-1]] = value
    (tmp_path / "m" / name).write_text(json.dumps(root["root"]))
    run_all(tmp_path, capfd)


@pytest.mark.parametrize(
    "name", ["config.json", "report.json", "cap_config.json", "preprocessor_config.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["folder", "link", "loop", "pipe", "empty", "nested", "device"])
def test_no_kind_of_file_ends_in_a_traceback(whole, name, kind, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "m")
    path = tmp_path / "m" / name
    path.unlink()
    {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("/etc/hostname"),
        "loop": lambda: path.symlink_to(name),
        "pipe": lambda: os.mkfifo(path),
        "empty": lambda: path.write_text(""),
        "nested": lambda: path.write_text("[" * 100_000),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    run_all(tmp_path, capfd, push_fails=True)


def run_all(folder, capfd, push_fails=False):
    """Each command ends with 0, or with 1 and one line, and leaves nothing behind then."""
    for command, extra in (
        ("inspect", []),
        ("compress", []),
        ("push", ["--hub_model_id", "a/b", "--dry_run", "true"]),
    ):
        arguments = ["--model_name_or_path", str(folder / "m"), "--output_dir", str(folder / command), *extra]
        code = run_command(command, arguments)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "it/s]" not in line]
        assert (code, len(lines)) in ((0, 0), (1, 1)), lines
        assert code == 1 or not (push_fails and command == "push")
        if code:
            assert lines[0].startswith(f"cap-hf {command}: ")
            assert not (folder / command).exists()
            assert ".partial" not in lines[0]
