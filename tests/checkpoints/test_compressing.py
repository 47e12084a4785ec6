"""Checkpoints in int8: which weights become int8, in every architecture, from plain and from compressed files."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    assert_same_weights,
    make_checkpoint,
    make_int8_checkpoints,
    make_model,
    round_to_int8,
)
from support.models import ARCHITECTURES, build
from torch import nn
from transformers import AutoModelForImageClassification, BertConfig, BertForMaskedLM

from cap_hf import CAPCompressor, CAPConfig, CAPError, find_targets
from cap_hf.checkpoints.compressing import compress_checkpoint, int8_names
from cap_hf.checkpoints.compression import COMPRESSED_NAME, PARTS, SCALES
from cap_hf.checkpoints.files import check_file
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.checkpoints.weights import count_bytes, find_weight_files, iterate_weights


def names_in_int8(folder):
    names = {name for path in find_weight_files(folder).paths for name in check_file(path).names}
    return {name.removesuffix(f".{SCALES}") for name in names if name.endswith(SCALES)}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("ResNet", "ConvNext")])
def test_every_architecture_comes_back_rounded(name, tmp_path):
    """Also those whose weights have other names in their files, or are split when they are loaded."""
    model = build(name)
    for target in find_targets(model):
        # A row of zeros takes next to nothing, so that tiny weights are worth their header.
        target.weight.data[target.weight.shape[0] // 8 :] = 0
    model.save_pretrained(tmp_path / "plain")
    compress_checkpoint(tmp_path / "plain", tmp_path / "int8", int8=True)
    stored = names_in_int8(tmp_path / "int8")
    assert stored
    plain = dict(iterate_weights(tmp_path / "plain"))
    assert all(plain[each].dim() == 2 for each in stored)
    found = dict(iterate_weights(tmp_path / "int8"))
    assert found.keys() == plain.keys()
    for each, tensor in plain.items():
        if each not in stored:
            assert torch.equal(found[each], tensor), each
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "int8")
    targets = {f"{target.name}.weight" for target in find_targets(model) if type(target.module) is nn.Linear}
    expected = round_to_int8(model).state_dict()
    for each, tensor in loaded.state_dict().items():
        step = expected[each].abs().max() / 127 if each in targets else 0
        assert bool(((tensor - expected[each]).abs() <= step).all()), each
        assert bool((tensor[model.state_dict()[each] == 0] == 0).all()), each


def test_targets_in_blocks_of_four_take_less_than_eight_hundredths_of_their_floats(tmp_path):
    model = build_wide()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", pattern="1x4"), disable_tqdm=True)
    compressor.prune(0.75)
    compressor.save_pretrained(tmp_path, compressed="int8")
    tensors = load_file(tmp_path / COMPRESSED_NAME)
    parts = {name: part for name, part in tensors.items() if name.rpartition(".")[2] in PARTS}
    targets = find_targets(model)
    dense = sum(4 * target.weight.numel() for target in targets)
    assert len(names_in_int8(tmp_path)) == len(targets)
    assert count_bytes(parts) <= 0.08 * dense
    # In the file, with its header, too.
    rest = count_bytes({name: tensor for name, tensor in tensors.items() if name not in parts})
    assert (tmp_path / COMPRESSED_NAME).stat().st_size - rest <= 0.09 * dense


def build_wide():
    config = copy.deepcopy(make_model().config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 192, 768, 2
    return type(make_model())(config).eval()


def test_from_plain_from_shards_and_from_compressed_it_is_the_same(tmp_path):
    model = make_int8_checkpoints(tmp_path)
    compress_checkpoint(tmp_path / "plain", tmp_path / "compressed")
    compress_checkpoint(tmp_path / "compressed", tmp_path / "again", int8=True)
    for name in ("config.json", "report.json", "cap_config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes(), name
    again, straight = (load_file(tmp_path / name / COMPRESSED_NAME) for name in ("again", "int8"))
    assert again.keys() == straight.keys()
    assert all(torch.equal(again[name], straight[name]) for name in again)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    compress_checkpoint(tmp_path / "shards", tmp_path / "sharded", int8=True)
    assert len(find_weight_files(tmp_path / "sharded").paths) > 1
    one, many = (dict(iterate_weights(tmp_path / name)) for name in ("int8", "sharded"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_damage_of_a_compressed_file_is_not_written_anew(tmp_path):
    model = make_model()
    save_checkpoint(tmp_path / "compressed", model, compressed=True)
    path = tmp_path / "compressed" / COMPRESSED_NAME
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CAPError, match="holds other bytes in .* than were written: the file is damaged"):
        compress_checkpoint(tmp_path / "compressed", tmp_path / "int8", int8=True)
    assert not (tmp_path / "int8").exists()


def test_a_compressor_saves_int8(tmp_path):
    model = make_model()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", pattern="1x4"), disable_tqdm=True)
    compressor.prune(0.9)
    compressor.save_pretrained(tmp_path / "c", compressed="int8")
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "c"), round_to_int8(model))
    with pytest.raises(CAPError, match="compressed is 'int4', and may be False, True or 'int8'"):
        compressor.save_pretrained(tmp_path / "d", compressed="int4")
    assert not (tmp_path / "d").exists()


def test_embeddings_heads_and_tied_weights_stay_floats(tmp_path):
    """An embedding may be as sparse as any target."""
    bert = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    model = BertForMaskedLM(bert).eval()
    names = int8_names(model)
    assert "bert.encoder.layer.0.intermediate.dense.weight" in names
    assert not any("embeddings" in name or "decoder" in name for name in names)
    model = make_model()
    for module in (model.classifier, model.vit.layers[0].mlp.fc1):
        module.weight.data[:, : 8 if module is model.classifier else 40] = 0
    save_checkpoint(tmp_path, model, compressed="int8")
    assert names_in_int8(tmp_path) == {"vit.encoder.layer.0.intermediate.dense.weight"}


def test_what_cannot_be_int8_is_one_line(tmp_path):
    make_int8_checkpoints(tmp_path)
    cases = {"already": (tmp_path / "int8", "int8 is compressed in int8 already")}
    make_model().save_pretrained(tmp_path / "dense")
    cases["dense"] = (
        tmp_path / "dense",
        "has nothing to store in int8: no Linear layer is 1 % zeros and large enough to gain; prune it first",
    )
    make_checkpoint(tmp_path / "nan", pattern="1x4")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["vit.encoder.layer.1.output.dense.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    cases["nan"] = (
        tmp_path / "nan",
        r"^vit\.encoder\.layer\.1\.output\.dense\.weight has entries that are NaN or infinite",
    )
    make_checkpoint(tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text()) | {"model_type": "unheard_of"}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    cases["foreign"] = (tmp_path / "foreign", "is a 'unheard_of', which this version of transformers does not know")
    make_checkpoint(tmp_path / "inner", pattern="1x4")
    config = json.loads((tmp_path / "inner" / "config.json").read_text()) | {"architectures": ["ViTModel"]}
    (tmp_path / "inner" / "config.json").write_text(json.dumps(config))
    cases["inner"] = (tmp_path / "inner", "its weights have other names than those of the class that config.json names")
    for case, (folder, line) in cases.items():
        with pytest.raises(CAPError, match=line) as error:
            compress_checkpoint(folder, tmp_path / "out", int8=True)
        assert "\n" not in str(error.value), case
        assert not (tmp_path / "out").exists()
    with pytest.raises(CAPError, match="int8 is compressed in int8 already"):
        compress_checkpoint(tmp_path / "int8", tmp_path / "out")


def test_convolutions_are_no_linear_layers():
    convolutions = build("ConvNext")
    assert all("pwconv" in name or "classifier" in name for name in int8_names(convolutions))
    assert int8_names(build("ResNet")) <= {"classifier.1.weight"}
