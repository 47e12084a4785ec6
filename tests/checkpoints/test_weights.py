"""Which files hold the weights, and what they hold."""

import json

import pytest
import torch
from support.checkpoints import make_checkpoint, make_int8_checkpoints, make_model

from cap_hf import CAPError
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.compression import VALUES
from cap_hf.checkpoints.loading import check_folder
from cap_hf.checkpoints.weights import (
    count_bytes,
    count_negative_zeros,
    find_weight_files,
    iterate_weights,
    measure,
    to_stored,
)


def test_one_file_or_shards_plain_or_compressed(tmp_path):
    model = make_checkpoint(tmp_path / "plain")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    for name, compressed, count in (("plain", False, 1), ("shards", False, 3), ("compressed", True, 1)):
        files = find_weight_files(tmp_path / name)
        assert files.compressed == files.have_digests == compressed
        assert len(files.paths) == count
        assert (files.index is not None) == (count > 1)
        assert files.num_bytes == sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
    with pytest.raises(CAPError, match=r"there is no model\.safetensors"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [None, 1, [], {}, {"a": 1, "b": "x"}, {"a": ["x"]}, {"a": None}, {"a": ""}])
def test_an_index_without_names(weight_map, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "x").write_text("")
    with pytest.raises(CAPError, match=r"model\.safetensors\.index\.json(: weight_map| names)"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("name", ["no", "../x", "/etc/passwd", "x" * 5000, "\0", "\ud800", "."])
def test_an_index_with_names_of_nothing_in_the_folder(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CAPError, match=r"model\.safetensors\.index\.json names") as error:
        find_weight_files(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2 * len(str(tmp_path)) + 200


def test_bytes_are_those_that_compression_gives(tmp_path):
    model = make_checkpoint(tmp_path / "plain")
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    dense, compressed = measure(tmp_path / "plain")
    assert dense == sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert measure(tmp_path / "compressed") == (dense, compressed)
    header = find_weight_files(tmp_path / "compressed").num_bytes - compressed
    assert 0 < header < 512 * len(model.state_dict())
    for (name, one), (other, two) in zip(
        sorted(iterate_weights(tmp_path / "plain")), sorted(iterate_weights(tmp_path / "compressed")), strict=True
    ):
        assert name == other
        assert torch.equal(one, two)


def test_what_is_worth_packing():
    zeros = torch.zeros(64, 64)
    assert set(to_stored("a.bias", zeros)) == {"a.bias"}
    assert set(to_stored("a.weight", zeros[0])) == {"a.weight"}
    assert set(to_stored("a.weight", torch.randn(64, 64))) == {"a.weight"}
    assert set(to_stored("a.weight", zeros[:8, :8])) == {"a.weight"}  # smaller than the header's entries
    packed = to_stored("a.weight", zeros)
    assert f"a.weight.{VALUES}" in packed
    assert count_bytes(packed) == 64 * 64 / 8


def test_negative_zeros_are_counted(tmp_path):
    model = make_model()
    weight = model.vit.layers[0].mlp.fc1.weight.data
    weight[:, 8:] = 0
    weight[0, 8:13] = -0.0
    model.save_pretrained(tmp_path / "plain")
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    assert count_negative_zeros(tmp_path / "compressed") == 5


@pytest.mark.parametrize("version", [3, "2", None, [1]])
def test_what_a_newer_version_wrote_is_not_called_damaged(version, tmp_path):
    make_checkpoint(tmp_path, compressed=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (tmp_path / "config.json").write_text(json.dumps(config))
    for look in (find_weight_files, check_folder, lambda folder: list(iterate_weights(folder))):
        with pytest.raises(CAPError, match="update cap_hf to load it"):
            look(tmp_path)


def test_files_that_hold_int8_say_so(tmp_path):
    make_int8_checkpoints(tmp_path)
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    for name, int8 in (("plain", False), ("compressed", False), ("int8", True)):
        assert find_weight_files(tmp_path / name).have_int8 is int8
