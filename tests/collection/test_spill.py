"""Tensors on the disk in place of a dict of them."""

import pytest
import torch

from cap_hf.collection.spill import DiskTensors, SpilledSums
from cap_hf.errors import CAPError
from cap_hf.method.sums import SymmetricSums

CPU = torch.device("cpu")


def test_they_are_used_like_a_dict(tmp_path):
    tensors = DiskTensors(tmp_path / "new", CPU)
    a, b = torch.randn(3, 4), torch.arange(5, dtype=torch.int16)
    tensors["layer.a"], tensors["layer.b"] = a, b.expand(2, 5).T
    assert torch.equal(tensors["layer.a"], a)
    assert torch.equal(tensors["layer.b"], b.expand(2, 5).T)
    assert list(tensors) == ["layer.a", "layer.b"]
    assert "layer.a" in tensors
    assert torch.equal(tensors.pop("layer.a"), a)
    assert "layer.a" not in tensors
    with pytest.raises(KeyError):
        tensors["layer.a"]
    # Another run finds what this one has left.
    assert list(DiskTensors(tmp_path / "new", CPU)) == ["layer.b"]


def test_a_disk_that_fails_is_one_line(tmp_path, monkeypatch):
    tensors = DiskTensors(tmp_path / "full", CPU)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cap_hf.collection.spill.save_file", full)
    with pytest.raises(CAPError, match=r"full cannot be written \(.*No space left.*\): name another .*--spill_dir"):
        tensors["layer"] = torch.zeros(3)
    assert list(tensors) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CAPError, match=r"file/new cannot be written \(.*\): name another folder with --spill_dir"):
        DiskTensors(tmp_path / "file" / "new", CPU)


def test_sums_come_back_one_target_at_a_time(tmp_path):
    sizes = {"a": 48, "b": 96}
    spilled, kept = SpilledSums(tmp_path, sizes, CPU), {}
    for index, (name, size) in enumerate(sizes.items()):
        kept[name] = SymmetricSums.zeros(4, size, torch.float32, CPU)
        kept[name].add(slice(None), torch.randn(4, 7, size, generator=torch.Generator().manual_seed(index)))
    spilled.update(kept)
    assert list(spilled) == ["a", "b"]
    for name, sums in kept.items():
        assert torch.equal(spilled[name].full(), sums.full())
    assert spilled["b"] is spilled["b"]
    held = spilled["b"]
    assert spilled["a"] is not held
    assert spilled["b"] is not held


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_they_are_read_to_whatever_accelerate_calls_its_device(tmp_path, device):
    """Several processes on CPUs compute on cpu:0, which safetensors takes for none."""
    tensors = DiskTensors(tmp_path, torch.device(device))
    tensors["layer"] = torch.ones(3)
    assert torch.equal(tensors["layer"], torch.ones(3))


def test_a_damaged_file_is_one_line(tmp_path):
    (tmp_path / "layer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CAPError, match="layer.safetensors cannot be read"):
        DiskTensors(tmp_path, CPU)["layer"]
