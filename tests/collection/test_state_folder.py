"""The folder of a collection's state as people have it: a link, a new disk, one without locks, a damaged one."""

import errno

import pytest
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig, CAPError
from cap_hf.collection import state as state_module
from cap_hf.collection.state import Checkpointing, CollectionState
from cap_hf.distributed.processes import Processes


def collect(folder, resume=False):
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True)
    return compressor.collect(random_batches(model, 8), Checkpointing(folder, 4, resume))


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(tmp_path, there):
    """Also one to a folder that is made for the first time, and a disk that mkfs has just made."""
    disk = tmp_path / "disk" / "state"
    if there:
        (disk / "lost+found").mkdir(parents=True)
    (tmp_path / "state").symlink_to(disk)
    for _ in range(2):
        compressor = collect(tmp_path / "state")
        assert (disk / "rank-0").is_dir()
        compressor.discard_state()
        assert (tmp_path / "state").is_symlink()
        assert [path.name for path in disk.iterdir()] == ["lost+found"] * there


def test_a_folder_may_be_a_string(tmp_path):
    compressor = collect(str(tmp_path / "state"))
    assert (tmp_path / "state" / "rank-0").is_dir()
    compressor.discard_state()
    assert not (tmp_path / "state").exists()


def test_a_mount_point_stays(tmp_path, monkeypatch):
    compressor = collect(tmp_path / "state")

    def busy(_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("pathlib.Path.rmdir", busy)
    compressor.discard_state()
    assert not list((tmp_path / "state").iterdir())


def test_a_file_system_without_locks_is_taken(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(state_module.fcntl, "flock", refused)
    collect(tmp_path / "state").discard_state()
    assert not (tmp_path / "state").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CAPError, match=r"cannot write .*file/state.*: choose another folder"):
        CollectionState(Checkpointing(tmp_path / "file" / "state", 8), Processes(), {}, {})


@pytest.mark.parametrize("name", ["place.json", "0.safetensors"])
def test_a_damaged_save_is_one_line(tmp_path, name):
    collect(tmp_path / "state")
    for path in (tmp_path / "state").rglob(name):
        path.write_text("no such thing")
    state_module.LOCKS.clear()
    with pytest.raises(CAPError, match=r"step-0-\d+ cannot be read: remove .*state and begin anew"):
        collect(tmp_path / "state", resume=True)
