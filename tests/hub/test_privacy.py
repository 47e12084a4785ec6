"""Nothing of the machine, its user and its paths is published; names that libraries look for stay."""

import getpass
import json

import pytest

from cap_hf.hub import privacy
from cap_hf.hub.privacy import Private, clean_folder

PRIVATE = Private(("/srv/people/alice", "/tmp"), ("alice",), ("lab-7.example.org", "lab-7"))


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/srv/people/alice/models/vit", "vit"),
        ("/scratch/somebody/models/vit/", "vit"),
        ("/srv/people/alice", "folder"),
        ("/home/bob", "bob"),  # not this user: what it is cannot be known, where it lies is not said
        (r"C:\Users\alice\models\vit", "vit"),
        ("D:/data/cats", "cats"),
        (r"\\server\share\cats", "cats"),
        ("~/models/vit", "vit"),
        ("~alice/models/vit", "vit"),
        ("file:///data/cats", "cats"),
        ("/data/My cats/train", "train"),
        ("../alice/runs/vit", "vit"),
        ("runs/Jul05_12-00-00_lab-7", "runs/Jul05_12-00-00_host"),
        ("LAB-7.example.org", "host"),
        ("cap-hf prune --model /data/a/vit, then /srv/people/alice/x.", "cap-hf prune --model vit, then x."),
        ("'/home/bob/a' and C:\\Users\\bob\\b", "'a' and b"),
        ("cache=/tmp/x/y", "cache=y"),
        ("token hf_abcdefghijklmnopqrstuv", "token token"),
        # What is no path of this machine.
        ("alice/vit-small", "alice/vit-small"),
        ("google/vit-base", "google/vit-base"),
        ("runs/vit", "runs/vit"),
        ("https://example.org/home/alice/a", "https://example.org/home/alice/a"),
        ("hf://datasets/a/b", "hf://datasets/a/b"),
        ("T-shirt/top", "T-shirt/top"),
        ("and /or", "and /or"),
        ("</s>", "</s>"),
        ("2:4", "2:4"),
        ("outside the encoder, vit", "outside the encoder, vit"),
        ("tmpfs", "tmpfs"),
        ("", ""),
        ("/", "/"),
    ],
)
def test_what_is_private_is_told_by_its_value(value, published):
    assert PRIVATE.clean(value, words=True) == published
    assert PRIVATE.clean([{"x": [value]}], words=True) == [{"x": [published]}]
    assert PRIVATE.clean(published, words=True) == published


def test_a_host_that_is_called_like_something_else():
    private = Private((), (), ("vit",))
    # An architecture stays; of a report what is for people alone is taken out, names of layers are not.
    assert private.clean({"model_type": "vit", "host": "vit"}) == {"model_type": "vit", "host": "vit"}
    report = {"host": "vit", "vit": 1, "name": "vit.layers.0", "by": "ran on vit."}
    assert private.clean(report, words=True, kept=["vit.layers.0"]) == {
        "host": "host",
        "vit": 1,
        "name": "vit.layers.0",
        "by": "ran on host.",
    }


def test_classes_keep_their_names_and_keys_that_are_paths_do_not():
    config = {
        "id2label": {"0": "/m/01yrx", "1": "lab-7", "2": "/srv/people/alice/cat"},
        "label2id": {"/m/01yrx": 0, "lab-7": 1, "/srv/people/alice/cat": 2},
    }
    assert PRIVATE.clean(config) == {
        "id2label": {"0": "/m/01yrx", "1": "lab-7", "2": "cat"},
        "label2id": {"/m/01yrx": 0, "lab-7": 1, "cat": 2},
    }
    assert PRIVATE.clean({"/data/a/vit": {"top1": 0.5, "n": None, "ok": True}}) == {
        "vit": {"top1": 0.5, "n": None, "ok": True}
    }


def test_files_without_anything_private_keep_their_bytes(tmp_path):
    (tmp_path / "config.json").write_text('{"a":   "vit",\t"b": [1]}')
    (tmp_path / "tokenizer.json").write_text('{"merges": ["/tmp/x /srv/people/alice"]}')
    (tmp_path / "report.json").write_text('{"data": {"dataset_name": "/data/cats"}}')
    (tmp_path / "vocab.txt").write_text("/tmp/x\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    clean_folder(tmp_path, PRIVATE)
    changed = {path.name for path in tmp_path.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"report.json"}
    assert json.loads((tmp_path / "report.json").read_text()) == {"data": {"dataset_name": "cats"}}


def test_what_is_private_here_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setattr(privacy.socket, "gethostname", lambda: "Lab-7.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "adams")
    monkeypatch.setattr(privacy.tempfile, "gettempdir", lambda: "/scratch/tmp")
    monkeypatch.chdir(tmp_path)
    found = Private.here()
    assert set(found.folders) >= {str(tmp_path / "alice"), str(tmp_path), "/scratch/tmp"}
    assert found.users == ("adams", "alice")
    assert found.hosts == ("Lab-7.example.org", "Lab-7")


def test_a_user_without_a_name_and_a_home(monkeypatch):
    """As in many containers."""

    def nobody():
        raise KeyError("uid not found: 1234")

    def nowhere():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(getpass, "getuser", nobody)
    monkeypatch.setattr(privacy.tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(privacy.socket, "gethostname", lambda: "localhost")
    found = Private.here()
    assert (found.users, found.hosts) == ((), ())
    assert "/" not in found.folders
    assert found.clean("a/b/c") == "a/b/c"
