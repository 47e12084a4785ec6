"""What is saved loads the same, plain or compressed, and nothing half-written or dense is left on the way."""

import copy
import errno
import io
import json
import resource
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from support.checkpoints import assert_same_weights, make_checkpoint, make_model
from support.models import ARCHITECTURES, build
from support.packing import bits
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cap_hf import CAPCompressor, CAPConfig, CAPError, find_targets
from cap_hf.checkpoints import files, places
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.compression import COMPRESSED_NAME
from cap_hf.checkpoints.files import open_safetensors
from cap_hf.checkpoints.saving import save_checkpoint, save_compressed
from cap_hf.checkpoints.weights import find_weight_files, iterate_weights

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


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    model = build("ViT")
    save_checkpoint(tmp_path / "out", model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(places.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 4096))
        for folder in ("out", "new/out"):
            with pytest.raises(CAPError, match=r"out needs .* kB, and its disk has 4\.1 kB free: free some space, or"):
                save_checkpoint(tmp_path / folder, build("ViT"))

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


def assert_saved_alike(model, tmp_path, **arguments):
    """What is saved compressed, and what save_pretrained saves, tensor by tensor; loaded, it is the same model."""
    model.save_pretrained(tmp_path / "plain", **arguments)
    (tmp_path / "compressed").mkdir(exist_ok=True)
    save_compressed(model, tmp_path / "compressed", **arguments)
    plain, compressed = (dict(iterate_weights(tmp_path / name)) for name in ("plain", "compressed"))
    assert compressed.keys() == plain.keys()
    for name, tensor in plain.items():
        assert compressed[name].dtype == tensor.dtype
        assert torch.equal(bits(compressed[name]), bits(tensor)), name
    files = {path.name for path in (tmp_path / "plain").iterdir() if "model" not in path.name}
    assert files <= {path.name for path in (tmp_path / "compressed").iterdir()}
    loaded, info = type(model).from_pretrained(tmp_path / "compressed", output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(loaded, model)
    return loaded


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compressed_holds_what_save_pretrained_writes(name, tmp_path):
    model = build(name)
    CAPCompressor(model, CAPConfig(method="magnitude")).prune(0.8)
    loaded = assert_saved_alike(model, tmp_path)
    # A model that was loaded has its own list of the names that its file had.
    assert_saved_alike(loaded, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compressed_in_shards_and_half_precision(dtype, tmp_path):
    model = make_model().to(dtype)
    for target in find_targets(model):
        target.weight.data[:, ::3] = 0
    assert_saved_alike(model, tmp_path, max_shard_size="60KB")
    files = find_weight_files(tmp_path / "compressed")
    assert len(files.paths) == len(find_weight_files(tmp_path / "plain").paths) > 1
    index = json.loads(files.index.read_text())
    assert index["metadata"]["total_size"] < sum(tensor.numel() * 2 for tensor in model.parameters())


def test_compressed_names_that_transformers_changes_and_ties(tmp_path):
    """CLIP's checkpoints have other names than its modules; a tied weight is stored once."""
    clip = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    clip.update({"image_size": 8, "patch_size": 4})
    assert_saved_alike(CLIPVisionModelWithProjection(clip).eval(), tmp_path / "clip")
    bert = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    tied = BertForMaskedLM(bert).eval()
    assert tied.cls.predictions.decoder.weight is tied.bert.embeddings.word_embeddings.weight
    assert_saved_alike(tied, tmp_path / "tied")
    with open_safetensors(tmp_path / "tied" / "compressed" / COMPRESSED_NAME) as file:
        assert sum("decoder" in name or "word_embeddings" in name for name in file.keys()) == 1  # noqa: SIM118


def test_no_dense_file_is_ever_written(tmp_path, monkeypatch):
    """The system itself refuses any file of the size of the dense weights while a model is saved compressed."""
    model = make_model()
    CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True).prune(0.9)
    dense = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a file here may be longer than the limit already
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    resource.setrlimit(resource.RLIMIT_FSIZE, (dense // 2, before[1]))
    try:
        with pytest.raises(CAPError, match="cannot write"):
            save_checkpoint(tmp_path / "plain", model)
        save_checkpoint(tmp_path / "compressed", model, compressed=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "compressed"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]
    assert sorted(path.name for path in (tmp_path / "compressed").iterdir()) == ["config.json", COMPRESSED_NAME]


def test_what_cannot_be_saved_compressed(tmp_path):
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(CAPError, match="offloaded to the disk"):
        save_checkpoint(tmp_path / "out", model, compressed=True)
    model = make_model()
    model.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(CAPError, match="quantised with other"):
        save_checkpoint(tmp_path / "out", model, compressed=True)
    with pytest.raises(CAPError, match="cannot write .*file/out"):
        (tmp_path / "file").write_text("")
        save_checkpoint(tmp_path / "file" / "out", make_model())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_links_are_followed_inside_the_folder_only(tmp_path):
    make_checkpoint(tmp_path / "m")
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "m" / "inside.txt").symlink_to("config.json")
    (tmp_path / "m" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CAPError, match=r"notes\.txt is a link out of its folder"):
        compress_checkpoint(tmp_path / "m", tmp_path / "c")
    (tmp_path / "m" / "notes.txt").unlink()
    compress_checkpoint(tmp_path / "m", tmp_path / "c")
    assert (tmp_path / "c" / "inside.txt").read_text() == (tmp_path / "m" / "config.json").read_text()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(CAPError, match=r"model\.safetensors is a link out of its folder"):
        compress_checkpoint(tmp_path / "m", tmp_path / "c")


def test_json_is_parsed_before_it_is_copied(tmp_path):
    make_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text("-----BEGIN KEY-----")
    with pytest.raises(CAPError, match=r"preprocessor_config\.json cannot be read"):
        compress_checkpoint(tmp_path / "m", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_is_the_outputs_and_not_the_inputs(tmp_path, monkeypatch):
    """The input was to be downloaded again."""
    make_checkpoint(tmp_path / "m")

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files.safetensors.torch, "save_file", full)
    with pytest.raises(CAPError, match=r"^the disk of .*small is full: free some space, or choose another folder$"):
        compress_checkpoint(tmp_path / "m", tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def same_layer(model):
    model.vit.layers[1] = model.vit.layers[0]


def same_weight(model):
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight


def same_memory(model):
    model.vit.layers[1].mlp.fc1.weight.data = model.vit.layers[0].mlp.fc1.weight.data


@pytest.mark.parametrize("share", [same_layer, same_weight, same_memory])
def test_weights_that_transformers_cannot_save_are_named_before_the_work(share, tmp_path):
    model = build("ViT")
    share(model)
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path / "theirs")
    line = r"^vit\.layers\.0\..* and vit\.layers\.1\..* are one weight, .*: give each layer a weight of its own"
    with pytest.raises(CAPError, match=line):
        CAPCompressor(model)
    for compressed in (False, True):
        with pytest.raises(CAPError, match=line):
            save_checkpoint(tmp_path / "out", model, compressed=compressed)
    assert not (tmp_path / "out").exists()
    save_checkpoint(tmp_path / "out", copy.deepcopy(build("ViT")))
