"""What somebody else's folder holds is checked before it is used or copied."""

import json
import os

import pytest

from cap_hf import CAPConfig, CAPError
from cap_hf.checkpoints import folder
from cap_hf.checkpoints.folder import (
    check_inside,
    check_model_config,
    check_types,
    copy_file,
    read_cap_config,
    read_json,
    read_report,
)


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"1", b"null", b"{", b"\xff{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a": 1' + b"0" * 5000 + b"}"],
)
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CAPError, match=r"x\.json (cannot be read|holds no JSON object)") as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("pipe.json", "folder.json", "loop.json", "missing.json"):
        with pytest.raises(CAPError, match="is not there, or is no file"):
            read_json(tmp_path / name)
    (tmp_path / "large.json").write_text('{"a": 12345}')
    monkeypatch.setattr(folder, "JSON_BYTES", 10)
    with pytest.raises(CAPError, match="is larger than 10 bytes"):
        read_json(tmp_path / "large.json")


REPORT = {
    "model_name_or_path": "a/b",
    "seed": 42,
    "data": {"dataset_name": "x", "dataset_config_name": None},
    "versions": {"torch": "2"},
    "dense": {"top1": 1, "loss": 0.5, "num_examples": 8},
    "sparse": None,
    "pruning": {"layers": [{"name": "a", "num_zeros": 1, "shape": [1, 2]}]},
    "what cap_hf does not read": {"may": "be anything"},
}


def test_a_report_as_it_should_be(tmp_path):
    assert read_report(tmp_path) == {}
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert read_report(tmp_path) == REPORT


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["seed"], "](evil) <script>"),
        (["seed"], 1.5),
        (["seed"], True),
        (["seed"], 2**63),
        (["model_name_or_path"], 3),
        (["data"], "x"),
        (["data", "dataset_name"], ["x"]),
        (["versions"], ["x"]),
        (["versions", "torch"], 2),
        (["dense"], [1]),
        (["dense", "top1"], "1"),
        (["dense", "top1"], 10**400),
        (["dense", "num_examples"], 8.5),
        (["sparse"], 1),
        (["recovered"], {"top1": {}}),
        (["config"], []),
        (["pruning"], 1),
        (["pruning", "layers"], {"a": 1}),
        (["pruning", "layers", 0], None),
        (["pruning", "layers", 0, "name"], {}),
        (["pruning", "layers", 0, "num_zeros"], "1"),
        (["layers"], [1]),
    ],
)
def test_wrong_types_in_a_report_are_named(place, value, tmp_path):
    report = json.loads(json.dumps(REPORT))
    parent = report
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(CAPError, match=rf"report\.json: {place[0]}.* is .*, which is no ") as error:
        read_report(tmp_path)
    assert len(str(error.value)) < len(str(tmp_path)) + 150


def test_types():
    check_types(1, float, "x")
    check_types({"a": [1, 2]}, dict[str, list[int]], "x")
    with pytest.raises(CAPError, match=r"x\['a'\]\[1\] is None, which is no int"):
        check_types({"a": [1, None]}, dict[str, list[int]], "x")


def test_the_settings_of_a_checkpoint(tmp_path):
    assert read_cap_config(tmp_path) is None
    (tmp_path / "report.json").write_text(json.dumps({"config": {"method": "obs"}}))
    assert read_cap_config(tmp_path) == CAPConfig(method="obs", fisher_prior="identity", refit=False)
    CAPConfig(method="magnitude", exclude=["a*"]).save(tmp_path)
    assert read_cap_config(tmp_path) == CAPConfig(method="magnitude", exclude=["a*"])


@pytest.mark.parametrize(
    "values",
    [{"damp": "x"}, {"damp": []}, {"include": 5}, {"exclude": [1]}, {"method": []}, {"num_grads": None}, {"what": 1}],
)
@pytest.mark.parametrize("name", ["cap_config.json", "report.json"])
def test_settings_that_are_none(values, name, tmp_path):
    (tmp_path / name).write_text(json.dumps(values if name == "cap_config.json" else {"config": values}))
    with pytest.raises(CAPError, match=f"{name}(: | holds no settings)") as error:
        read_cap_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [{"num_hidden_layers": 10**9}, {"depths": [2, 2, 10**9]}, {"vision_config": {"a": {"num_hidden_layers": 41}}}],
)
def test_more_layers_than_tensors_are_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CAPError, match="and the weights are 40 tensors in all"):
        check_model_config(tmp_path, 40)
    check_model_config(tmp_path, 10**9)


def test_links(tmp_path):
    """Inside the folder, and from a snapshot of the Hub's cache to the blobs of the same repository."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    for name, target in {"blob": "../../blobs/1", "own": "blob", "out": "../../../secret", "up": tmp_path}.items():
        (snapshot / name).symlink_to(target)
    check_inside(snapshot / "blob", snapshot)
    check_inside(snapshot / "own", snapshot)
    for name in ("out", "up"):
        with pytest.raises(CAPError, match="is a link out of its folder"):
            check_inside(snapshot / name, snapshot)
    # A folder that calls itself a snapshot has no blobs elsewhere.
    (tmp_path / "fake" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "fake" / "blobs").symlink_to(tmp_path)
    (tmp_path / "fake" / "snapshots" / "1" / "x").symlink_to("../../blobs/secret")
    with pytest.raises(CAPError, match="is a link out of its folder"):
        check_inside(tmp_path / "fake" / "snapshots" / "1" / "x", tmp_path / "fake" / "snapshots" / "1")
    # The folder itself may be a link, as a user's own often is.
    (tmp_path / "link").symlink_to(snapshot)
    check_inside(tmp_path / "link" / "blob", tmp_path / "link")


def test_copies(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "a.json").write_text('{"a":  1}')
    (tmp_path / "in" / "b.json").write_text("ssh-rsa AAAA")
    copy_file(tmp_path / "in" / "a.json", tmp_path / "in", tmp_path / "out")
    with pytest.raises(CAPError, match=r"b\.json cannot be read"):
        copy_file(tmp_path / "in" / "b.json", tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.json"]
    assert (tmp_path / "out" / "a.json").read_text() == '{"a":  1}'
