"""Nothing is lost by writing a folder but a checkpoint, wherever the folder is and whoever writes it."""

import json
import os

import pytest

from cap_hf import CAPError
from cap_hf.checkpoints.atomic import atomic_directory, check_place
from cap_hf.checkpoints.replacing import check_replaceable, has_to_stay, is_empty

CHECKPOINT = {"config.json": '{"model_type": "vit"}', "model.safetensors": "weights"}


def put(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def tree(folder):
    return {str(path.relative_to(folder)): path.is_dir() or path.read_text() for path in folder.rglob("*")}


@pytest.fixture(params=["beside", "absolute", ".", "..", "link", "mounted"])
def place(request, tmp_path, monkeypatch):
    """A folder, and how it is called."""
    folder = tmp_path / "home"
    folder.mkdir()
    if request.param in ("absolute", "."):
        monkeypatch.chdir(folder)
    if request.param == "..":
        (folder / "below").mkdir()
        monkeypatch.chdir(folder / "below")
    if request.param == "mounted":
        monkeypatch.setattr("os.path.ismount", lambda path: path == folder)
    if request.param == "link":
        (tmp_path / "link").symlink_to(folder)
    return folder, {".": ".", "..": "..", "link": tmp_path / "link"}.get(request.param, folder)


@pytest.mark.parametrize(
    ("files", "lost"),
    [
        ({"thesis.txt": "x"}, "thesis.txt"),
        ({**CHECKPOINT, "thesis.txt": "x"}, "thesis.txt"),
        ({**CHECKPOINT, "report/thesis.png": "x"}, "report"),
        ({**CHECKPOINT, "report/accuracy.png/thesis": "x"}, "report"),
        ({"README.md": "mine"}, "README.md"),
        ({"config.json": '{"port": 80}', "README.md": "mine"}, "README.md|config.json"),
        ({"config.json": "{", "tokenizer.json": ""}, "config.json"),
        ({"inspect.json": "{}", "report.json": "{}"}, "report.json"),
        ({"model.safetensors": ""}, "model.safetensors"),
        ({"lora.safetensors": "mine", **CHECKPOINT}, "lora.safetensors"),
        ({**CHECKPOINT, "train.py": "mine"}, "train.py"),
        ({**CHECKPOINT, "data/cat/1.png": "x"}, "data"),
        ({**CHECKPOINT, "sparsity-0.5/config.json": "{}"}, "sparsity-0.5"),
        ({**CHECKPOINT, "README.md/mine": "x"}, "README.md"),
        ({**CHECKPOINT, "runs/mine": "x"}, "runs"),
        ({**CHECKPOINT, ".eval_results/mine.txt": "x"}, ".eval_results"),
        ({".eval_results/cifar10.yaml": "x"}, ".eval_results"),
        ({**CHECKPOINT, ".git/HEAD": "x"}, ".git"),
    ],
)
def test_what_would_be_lost_is_named_and_stays(place, files, lost):
    folder, called = place
    put(folder, files)
    before = tree(folder)
    line = f"home holds ({lost}|below), which would be lost: .*; choose another folder"
    with pytest.raises(CAPError, match=line), atomic_directory(called):
        raise AssertionError("the work was done in vain")
    # Also of what was put there meanwhile.
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.name != "below":
            path.rmdir() if path.is_dir() else path.unlink()
    if not (folder / "below").exists():
        with pytest.raises(CAPError, match=line), atomic_directory(called) as new:
            put(new, CHECKPOINT)
            put(folder, files)
        assert tree(folder) == before
    assert sorted(os.listdir(folder.parent)) in (["home"], ["home", "link"])


CODE = {
    "config.json": json.dumps({"model_type": "x", "auto_map": {"AutoModel": "user/repo--modeling_x.Model"}}),
    "preprocessor_config.json": json.dumps({"auto_map": {"AutoImageProcessor": [None, "seeing_x.Processor"]}}),
    "modeling_x.py": "from .layers_x import Layer",
    "layers_x.py": "",
    "seeing_x.py": "",
}


@pytest.mark.parametrize(
    "files",
    [
        {},
        CHECKPOINT,
        CODE,
        {"config.json": "{", "model.safetensors": ""},
        {"inspect.json": "", "eval_results.json": "", "benchmark.json": "", "benchmark.png": "", "report.html": ""},
        {**CHECKPOINT, ".eval_results/cifar10.yaml": ""},
        {**CHECKPOINT, "report.html": "", "report/recorded.json": "", "report/accuracy.png": ""},
        {**CHECKPOINT, "training_args.bin": "", "runs/Jul05_12-00-00_host/events.out.tfevents.1": ""},
        {
            "config.json": CHECKPOINT["config.json"],
            "model-00001-of-00002.safetensors": "",
            "model.safetensors.index.json": "",
            "model.cap-00001-of-00002.safetensors": "",
            "model.cap.safetensors.index.json": "",
            "model.onnx": "",
            "model.onnx.data": "",
            "tokenizer.json": "",
            "README.md": "",
            "sparsity.png": "",
            "cap_config.json": "",
            "report.json": "",
        },
    ],
)
def test_a_checkpoint_is_replaced_and_so_is_an_empty_folder(place, files):
    folder, called = place
    if called == "..":
        (folder / "below").rmdir()  # the current folder is nowhere then
        called = folder
    put(folder, files)
    with atomic_directory(called) as new:
        put(new, {"config.json": "new"})
    assert tree(folder) == {"config.json": "new"}


def test_a_copy_is_not_lost_and_the_source_stays(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    put(source, {**CHECKPOINT, "notes.txt": "a"})
    put(output, {**CHECKPOINT, "notes.txt": "a"})
    check_replaceable(output, source)
    (output / "notes.txt").write_text("b")
    with pytest.raises(CAPError, match=r"output holds notes.txt, which would be lost"):
        check_replaceable(output, source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CAPError, match="source is the checkpoint itself: choose another --output_dir"):
        check_replaceable(tmp_path / "link", source)
    check_replaceable(tmp_path / "not there", source)


def test_what_a_killed_run_left_half_exchanged_is_put_right_before_it_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {**CHECKPOINT, "README.md": "card"})
    # As a kill leaves it after the first two renames.
    left = tmp_path / f".{tmp_path.name}.x.partial"
    put(left, {"lock": "", "old/keep": ""})
    (left / "old" / "keep").unlink()
    for name in CHECKPOINT:
        (tmp_path / name).rename(left / "old" / name)
    check_place(".")
    assert sorted(os.listdir()) == sorted([*CHECKPOINT, "README.md"])


def test_what_mkfs_puts_onto_a_disk_is_nothing_and_stays(tmp_path):
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    assert is_empty(tmp_path / "disk")
    with atomic_directory(tmp_path / "disk") as folder:
        put(folder, CHECKPOINT)
    assert sorted(os.listdir(tmp_path / "disk")) == sorted([*CHECKPOINT, "lost+found"])
    assert not is_empty(tmp_path / "disk")


def test_a_folder_that_another_run_takes_away_at_this_moment_does_not_have_to_stay(tmp_path, monkeypatch):
    put(tmp_path / "out", CHECKPOINT)

    def taken_away(path):
        os.rename(path, tmp_path / "old")
        return False

    monkeypatch.setattr("os.path.ismount", taken_away)
    assert not has_to_stay(tmp_path / "out")
    assert (tmp_path / "old").is_dir()
