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
        ("//nas/share/cats", "cats"),
        (r"see C:\Users\John Smith\models\x now", "see x now"),
        ("s3://bucket/x /data/secret project/a b", "s3://bucket/x a b"),
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
def test_what_is_private_in_a_report_is_told_by_its_value(value, published):
    assert PRIVATE.clean(value, PRIVATE.hide) == published
    assert PRIVATE.clean([{"x": [value]}], PRIVATE.hide) == [{"x": [published]}]
    assert PRIVATE.clean(published, PRIVATE.hide) == published


@pytest.mark.parametrize("key", ["_name_or_path", "teacher_model_name_or_path", "dataset_name", "output_dir"])
@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/srv/people/alice/models/vit", "vit"),
        ("../../home/bob/pics/d", "d"),
        ("home/bob/pics", "pics"),
        ("../../../root/my pics/d", "d"),
        (r"C:\Users\alice\models\vit", "vit"),
        ("google/vit-base", "google/vit-base"),
        ("vit", "vit"),
        ("s3://bucket/x/vit", "s3://bucket/x/vit"),
        (None, None),
    ],
)
def test_of_what_something_was_made_from_only_the_name_is_published(key, value, published):
    assert PRIVATE.clean({"data": {key: value}}) == {"data": {key: published}}


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/scratch/somebody/models/vit", "vit"),
        (r"C:\Users\John Smith\models\x", "x"),
        ("//nas/share/x", "x"),
        ("data/John Smith/x y", "x y"),
        ("../John Smith/vit", "vit"),
        ("John Smith/vit", "vit"),
        ("from /srv/John Smith/runs/a: no", "from a: no"),
        ("from /mnt/old disk/John Smith/a b", "from a b"),
        ("in /tmp/x.", "in x."),
        ("hf_abcdefghijklmnopqrstuv", "token"),
        # What a library may go by: never the host, no path that is none.
        *(
            (text, text)
            for text in (
                *("lab-7", "modeling_lab-7.MyVit", "google/lab-7", "/think", "/", "~", "C:\\", "a:/", "//", "/ /"),
                *("/(?:a|b)/", "/a|b/c", r"\d+/\w+", r"\\", "a /b/c d", "1/2/3", "https://x.org/John Smith/a"),
            )
        ),
    ],
)
def test_elsewhere_a_path_is_one_as_a_whole_or_has_a_name_of_this_machine(value, published):
    private = Private(("/srv/John Smith", "/tmp"), ("John Smith",), ("lab-7",))
    assert private.clean({"x": [value]}) == {"x": [published]}
    assert private.clean({"x": [published]}) == {"x": [published]}


@pytest.mark.parametrize(
    "technical",
    [
        {"architecture": "vit_small_patch16_224.vit", "model_type": "vit", "architectures": ["vit"]},
        {"auto_map": {"AutoModel": "modeling_vit.MyVit"}},
        {"weight_map": {"vit.layers.0.weight": "vit-00001-of-00002.safetensors"}},
        {"quantization_config": {"weights_file": "vit.safetensors", "path": "/a/b"}},
        {"label_names": ["/m/01yrx", "vit"], "label_descriptions": {"/m/01yrx": "a vit"}},
        {"id2label": {"0": "/m/01yrx"}, "label2id": {"/m/01yrx": 0, "vit": 1}},
        {"additional_special_tokens": ["/think/a"], "eos_token": {"content": "/m/a"}},
        {"include": ["*.layer.*/x"], "config": {"method": "vit"}, "layers": [{"name": "vit.layers.0"}]},
    ],
)
def test_what_libraries_go_by_stays_wherever_it_is(technical):
    private = Private(("/m",), ("layer",), ("vit",))
    for change in (None, private.hide):
        assert private.clean(technical, change) == technical
        assert private.clean([{"a": technical}], change) == [{"a": technical}]


def test_keys_that_are_paths_are_shortened_and_none_is_lost():
    results = {"/data/a/vit": {"top1": 0.5, "n": None, "ok": True}, "/data/b/vit": 1, "vit": 2, "lab-7": 3}
    assert PRIVATE.clean(results) == {"vit": {"top1": 0.5, "n": None, "ok": True}, "vit_": 1, "vit__": 2, "lab-7": 3}


def test_files_without_anything_private_keep_their_bytes(tmp_path):
    (tmp_path / "config.json").write_text('{"a":   "vit",\t"b": [1]}')
    (tmp_path / "tokenizer.json").write_text('{"merges": ["/tmp/x /srv/people/alice"]}')
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"name_or_path": "/a/lab-7", "vocab_file": "lab-7.txt", "special_tokens_map_file": "/a/b", "x": "/tmp/x"}
        )
    )
    (tmp_path / "report.json").write_text('{"data": {"dataset_name": "/data/cats"}}')
    (tmp_path / "vocab.txt").write_text("/tmp/x\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    clean_folder(tmp_path, PRIVATE)
    changed = {path.name for path in tmp_path.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"report.json", "tokenizer_config.json"}
    tokenizer = {"name_or_path": "host", "vocab_file": "lab-7.txt", "special_tokens_map_file": "b", "x": "/tmp/x"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == tokenizer
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
