"""Push and load against a local server, with the real huggingface_hub and transformers in other processes."""

import json
import subprocess

import pytest
import safetensors.torch
import torch
from support.checkpoints import (
    PYTHON,
    assert_same_weights,
    clean_environment,
    make_checkpoint,
)
from support.hub_server import Fault, HubServer
from transformers import AutoModelForImageClassification

from cap_hf import CAPError
from cap_hf.checkpoints.files import check_file, open_safetensors
from cap_hf.checkpoints.weights import find_weight_files, iterate_weights
from cap_hf.hub import publish
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


@pytest.mark.parametrize("host", ["model", "vit"])
def test_a_host_that_is_called_like_a_file_or_a_model_breaks_nothing(tmp_path, monkeypatch, host):
    monkeypatch.setattr("socket.gethostname", lambda: host)
    model = make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    for compressed in (False, True):
        prepare_folder(tmp_path / "m", tmp_path / "out", "user/x", compressed)
        assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "out"), model)
        unchanged = () if compressed else ("config.json", "model.safetensors.index.json")
        for name in ("preprocessor_config.json", "cap_config.json", *unchanged):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_what_could_not_be_loaded_is_not_published(tmp_path, monkeypatch):
    """Whatever cleaning does to it."""

    def damage(folder, private):
        (folder / "config.json").write_text('{"model_type": "host"}')

    make_checkpoint(tmp_path / "m")
    monkeypatch.setattr(publish, "clean_folder", damage)
    with pytest.raises(CAPError, match=r"m cannot be loaded without what is private in it: .*'host'"):
        prepare_folder(tmp_path / "m", tmp_path / "out", "user/x")
    assert not (tmp_path / "out").exists()


def test_nothing_of_this_machine_is_in_any_byte_that_is_published(tmp_path, monkeypatch):
    """Whatever has it: a report of absolute paths, configs, metadata of weights, the card, the picture."""
    home = tmp_path / "people" / "alice"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("socket.gethostname", lambda: "lab-7.example.org")
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    facts = {
        "model_name_or_path": str(home / "models" / "dense-vit"),
        "teacher_model_name_or_path": r"C:\Users\alice\models\teacher",
        "data": {"dataset_name": str(tmp_path / "cats"), "eval_split_name": "test", "cache_dir": "~/cache"},
        "training_arguments": {"logging_dir": "runs/Jul05_12-00-00_lab-7", "run_name": str(home / "run")},
        "resources": {"spill_dir": "/scratch/alice/spill"},
        "versions": {"torch": f"2.13 from {home}/torch"},
        "host": "lab-7.example.org",
    }
    folder = tmp_path / "m"
    make_checkpoint(folder, facts=facts)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": str(home / "models" / "vit"), "log_dir": "lab-7", "file": "C:\\Users\\x"}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"path": str(home)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/alice/clip"}))
    weights = folder / "model.safetensors"
    with open_safetensors(weights) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt", "path": f"by lab-7 in {home}/é"})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for compressed in (False, True):
        ready = tmp_path / f"ready-{compressed}"
        prepare_folder(folder, ready, "someone/small-vit", compressed)
        names = {path.name for path in ready.iterdir()}
        assert {"README.md", "sparsity.png", "report.json", "tokenizer_config.json", "cap_config.json"} < names
        for path in ready.iterdir():
            for private in (str(tmp_path), "alice", "lab-7", "Users", "scratch", "/home"):
                assert private.encode() not in path.read_bytes(), (path.name, private)
        report = json.loads((ready / "report.json").read_text())
        assert report["model_name_or_path"] == "dense-vit"
        assert report["data"]["dataset_name"] == "cats"
        command = (
            "cap-hf finetune --model_name_or_path dense-vit --teacher_model_name_or_path teacher --dataset_name cats"
        )
        assert command in (ready / "README.md").read_text()
        published = dict(iterate_weights(ready))
        assert published.keys() == tensors.keys()
        assert all(torch.equal(published[name], value) for name, value in tensors.items())
        check_file(find_weight_files(ready).paths[0])
    # Here everything is as it was.
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
