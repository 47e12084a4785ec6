"""Zeros survive saving and loading, and a final name never holds half a checkpoint."""

import errno
import json
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.models import ARCHITECTURES, build
from transformers import AutoModelForImageClassification

import cap_hf.checkpoints.saving as checkpoint_module
from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.checkpoints.atomic import atomic_directory, write_json
from cap_hf.checkpoints.saving import save_checkpoint

HERE = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_from_pretrained_gives_the_same_weights(name, tmp_path):
    model = build(name)
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"))
    compressor.prune(0.8)
    compressor.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "sparse")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert CAPConfig.load(tmp_path / "sparse") == compressor.config
    report = json.loads((tmp_path / "sparse" / "report.json").read_text())
    assert report["num_zeros"] == sum(int((target.weight == 0).sum()) for target in compressor.targets)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse"]


def test_a_failure_leaves_the_old_folder(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "old").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("2")
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_killed_process_leaves_no_final_name(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from cap_hf.checkpoints.saving import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with atomic_directory(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    model = build("ViT")
    save_checkpoint(tmp_path / "out", model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: usage(10, 10, 0))
        with pytest.raises(CAPError, match=r"out needs .* MB, its disk has 0 MB free"):
            save_checkpoint(tmp_path / "out", build("ViT"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(CAPError, match="disk of .*out is full"):
        save_checkpoint(tmp_path / "out", model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_write_that_fails_half_way_is_one_line(tmp_path):
    """The system's own refusal, in the middle of safetensors' file."""
    code = (
        "import resource, signal, sys\n"
        "from support.models import build\n"
        "from cap_hf.checkpoints.saving import save_checkpoint\n"
        "model = build('ViT')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "save_checkpoint(sys.argv[1], model)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False, cwd=HERE
    )
    assert done.returncode == 1
    assert "cap_hf.errors.CAPError: cannot write" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "kept").write_text("")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CAPError, match="file is a file"), atomic_directory(tmp_path / "file"):
        pass


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_around_the_renames_leaves_one_whole_folder(tmp_path, monkeypatch, rename, after):
    """Ctrl-C just before or just after either of the two renames that replace a folder."""
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "old").write_text("1")
    calls, real = [], checkpoint_module.os.rename

    def interrupted(source, destination):
        calls.append(source)
        if len(calls) == rename and not after:
            raise KeyboardInterrupt
        real(source, destination)
        if len(calls) == rename:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as folder:
        (folder / "new").write_text("2")
    whole = "new" if rename == 2 and after else "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", whole]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CAPError, match="cannot write .*file/out"):
        save_checkpoint(tmp_path / "file" / "out", build("ViT"))
    with pytest.raises(CAPError, match="cannot write .*file/report.json"):
        write_json(tmp_path / "file" / "report.json", {})


def test_write_json_replaces(tmp_path):
    write_json(tmp_path / "a" / "x.json", {"a": 1})
    write_json(tmp_path / "a" / "x.json", {"a": 2})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"a": 2}
    assert len(list((tmp_path / "a").iterdir())) == 1
