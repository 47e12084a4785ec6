"""Memory and disk to plan with."""

import types

import pytest
import torch

from cap_hf.collection import room
from cap_hf.collection.resources import Resources
from cap_hf.errors import CAPError

CPU = torch.device("cpu")


def test_memory_is_divided_between_the_processes_of_a_machine(monkeypatch):
    alone = room.available_bytes(Resources(), CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room.available_bytes(Resources(), CPU) == pytest.approx(alone / 4, rel=0.3)


def test_a_limit_counts_what_is_in_use():
    used = room.psutil.Process().memory_info().rss
    limit = used + 10**8
    assert room.available_bytes(Resources(max_memory=f"{limit}"), CPU) == pytest.approx(10**8, abs=5 * 10**7)


def test_a_device_is_asked_for_its_own_memory(monkeypatch):
    memory = types.SimpleNamespace(
        memory_allocated=lambda device: 300,
        memory_reserved=lambda device: 500,
        mem_get_info=lambda device: (1000, 2000),
    )
    monkeypatch.setattr(room.torch, "get_device_module", lambda device: memory)
    # What is reserved and not allocated is free too.
    assert room.available_bytes(Resources(), torch.device("meta")) == int(1200 * room.HEAD_ROOM)


def test_a_disk_without_room_is_named(monkeypatch, tmp_path):
    resources = Resources(spill_dir=str(tmp_path / "spill"))
    room.check_disk(10**6, 2, resources)
    with pytest.raises(CAPError, match=r"3 passes keep .* GB in .*spill, where .* are free: name another folder"):
        room.check_disk(10**18, 3, resources)


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CAPError, match="--spill_dir .*file/spill cannot be made"):
        room.spill_folder(Resources(spill_dir=str(tmp_path / "file" / "spill")))
    with pytest.raises(CAPError, match=r"nowhere cannot be written \(.*\): name another folder with --spill_dir"):
        room.disk_seconds(tmp_path / "nowhere")
    assert 0 < room.disk_seconds(tmp_path) < 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_folder_for_temporary_files_one_can_be_named(tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(room.tempfile, "gettempdir", nowhere)
    with pytest.raises(CAPError, match="no folder for temporary files .*: set TMPDIR, or name one with --spill_dir"):
        room.spill_folder(Resources())
    (tmp_path / "link").symlink_to(tmp_path)
    assert room.spill_folder(Resources(spill_dir=str(tmp_path / "link"))).is_dir()
