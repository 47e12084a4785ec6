"""Whole checkpoints of other libraries become plain ones, or stay where they are."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import assert_same_weights, make_checkpoint, make_model
from support.foreign import SPARSITY, bitmask_parts, rewrite, save_bitmask, save_masked, two_of_four
from transformers import AutoModelForImageClassification, BertConfig, BertModel

from cap_hf import find_targets
from cap_hf.checkpoints.converting import Converted, clean_config, convert_checkpoint
from cap_hf.checkpoints.weights import count_negative_zeros
from cap_hf.errors import CAPError

PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def make_sparse(dtype=torch.float32):
    """A model with zeros in every target, and a magnitude of negative ones among what is kept."""
    model = make_model()
    with torch.no_grad():
        for target in find_targets(model):
            target.weight[target.weight.abs() < 0.01] = 0
    return model.to(dtype)


def shard(folder, *groups):
    """Spread the tensors of a checkpoint in one file over several, by the ends of their names; the rest is the last."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, ends in enumerate([*groups, ("",)], 1):
        chosen = {name: tensors.pop(name) for name in list(tensors) if name.endswith(ends)}
        file = f"model-{number:05d}-of-{len(groups) + 1:05d}.safetensors"
        save_file(chosen, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [save_bitmask, save_masked])
def test_conversion_gives_back_the_model(save, dtype, tmp_path):
    model = make_sparse(dtype)
    save(model, tmp_path / "x")
    (tmp_path / "x" / "README.md").write_text("mine")
    found = convert_checkpoint(tmp_path / "x", tmp_path / "m")
    count = sum(name.endswith(".weight") for name in model.state_dict())
    targets = len(list(find_targets(model)))
    assert found == (
        Converted(count, 0, ("quantization_config",)) if save is save_bitmask else Converted(0, targets, ())
    )
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "m", dtype="auto"), model)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.metadata()["cap_digests"]) == 32 * len(model.state_dict())


def test_two_of_four_and_shards_with_the_parts_of_one_weight(tmp_path):
    model = make_sparse()
    with torch.no_grad():
        for target in find_targets(model):
            target.weight[~two_of_four(target.weight)] = 0
    save_bitmask(model, tmp_path / "x")
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    state = load_file(plain / "model.safetensors")
    packed = {name.removesuffix(".weight"): state[name] for name in state if name.endswith("dense.weight")}

    def pack(tensors):
        for name, weight in packed.items():
            for part in PARTS:
                del tensors[f"{name}.{part}"]
            parts = bitmask_parts(weight, two_of_four(weight))
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})

    rewrite(tmp_path / "x", pack, {"compression_config": {"sparsity_config": SPARSITY}, "sparsity_config": {}})
    shard(tmp_path / "x", (".bitmask", ".row_offsets"), ("intermediate.dense.compressed", "intermediate.dense.shape"))
    found = convert_checkpoint(tmp_path / "x", tmp_path / "m")
    assert found.sections == ("quantization_config", "compression_config", "sparsity_config")
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "m"), model)
    # What a weight's values were in, its file is; one that held nothing but bitmasks is not there.
    files = [f"model-{number:05d}-of-00003.safetensors" for number in (2, 3)]
    assert sorted(path.name for path in (tmp_path / "m").glob("*.safetensors")) == files
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: files["intermediate.dense.weight" not in name] for name in state}
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in state.values())


def test_masks_that_nncf_leaves_beside_dense_weights(tmp_path):
    import nncf

    images = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
    pruned = nncf.prune(make_model(), mode, ratio=0.5, examples_inputs=images)
    pruned.save_pretrained(tmp_path / "x")
    found = convert_checkpoint(tmp_path / "x", tmp_path / "m")
    # All weights of Linear and Conv2d layers: twelve of the encoder, of the patch embedding and of the head.
    assert found == Converted(0, 14, ())
    converted = AutoModelForImageClassification.from_pretrained(tmp_path / "m")
    weights = [
        module.weight for module in converted.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    zeros, count = sum(int((each == 0).sum()) for each in weights), sum(each.numel() for each in weights)
    assert abs(zeros - count / 2) <= 1
    inputs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(converted.eval()(inputs).logits, pruned.eval()(inputs).logits, atol=1e-6)


def test_whole_weights_with_zeros_lose_the_sign_of_zeros(tmp_path):
    model = make_checkpoint(tmp_path / "x")
    weights = model.vit.layers[0].mlp.fc1.weight.detach()
    weights[weights == 0] = -0.0
    model.save_pretrained(tmp_path / "x")
    rewrite(tmp_path / "x", dict, {"sparsity_config": {"format": "dense"}})
    assert convert_checkpoint(tmp_path / "x", tmp_path / "m") == Converted(0, 0, ("sparsity_config",))
    weights[weights == 0] = 0.0
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path / "m"), model)
    assert count_negative_zeros(tmp_path / "m") == 0


def lose(part):
    def change(folder):
        rewrite(folder, lambda tensors: tensors.pop(f"vit.encoder.layer.0.intermediate.dense.{part}"))

    return change


def add(name, tensor):
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def say(**sections):
    return lambda folder: rewrite(folder, dict, sections)


def compress(folder):
    make_checkpoint(folder, compressed=True)


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_text(folder):
    shutil.rmtree(folder)
    BertModel(
        BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    ).save_pretrained(folder)


def twice(folder):
    shard(folder, (".bitmask",))
    last = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(last) | {"vit.encoder.layer.0.intermediate.dense.bitmask": torch.zeros(1)}, last)


QUANTISED = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": {}}}
MISTAKES = {
    "part": (lose("bitmask"), "vit.encoder.layer.0.intermediate.dense.bitmask is missing, and"),
    "offsets": (
        lose("row_offsets"),
        "vit.encoder.layer.0.intermediate.dense.weight cannot be put together: it lacks row_offsets",
    ),
    "mask": (
        add("vit.encoder.layer.0.intermediate.dense.bitmask", torch.zeros(96, 7, dtype=torch.uint8)),
        "its shape is (96, 48), and its bitmask has the shape (96, 7)",
    ),
    "weight": (lambda folder: rewrite(folder, lose_bias), "has no weights for classifier.bias of a"),
    "quantised": (say(quantization_config=QUANTISED), "x is quantised (int-quantized), which"),
    "torchao": (say(quantization_config={"quant_method": "torchao"}), "x is quantised (torchao), which"),
    "int8": (
        add("vit.encoder.layer.0.intermediate.dense.compressed", torch.ones(3, dtype=torch.int8)),
        "vit.encoder.layer.0.intermediate.dense.weight is stored in I8, so it is quantised",
    ),
    "scale": (add("classifier.weight_scale", torch.ones(3)), "x is quantised (classifier.weight_scale in F32), which"),
    "transform": (say(quantization_config={"transform_config": {"config_groups": {"u": {}}}}), "has transformed"),
    "format": (say(sparsity_config={"format": "marlin-24"}), "has its weights in the format 'marlin-24', and known"),
    "section": (say(quantization_config=["x"]), "has no names and values in its quantization_config"),
    "finite": (
        lambda folder: rewrite(folder, lambda tensors: tensors["classifier.bias"].fill_(torch.nan)),
        "classifier.bias",
    ),
    "ours": (compress, "is compressed by cap_hf, and every command takes it as it is"),
    "pickle": (pickle, "x has its weights in pytorch_model.bin: only safetensors are read"),
    "text": (of_text, "BertModel takes no images"),
    "twice": (
        twice,
        "vit.encoder.layer.0.intermediate.dense.bitmask is in model-00001-of-00002.safetensors and in model-00002",
    ),
    "layers": (say(num_hidden_layers=10**9), "asks for 1000000000 num_hidden_layers"),
}


def lose_bias(tensors):
    del tensors["classifier.bias"]


@pytest.mark.parametrize(("spoil", "line"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_leave_nothing(spoil, line, tmp_path):
    save_bitmask(make_sparse(), tmp_path / "x")
    spoil(tmp_path / "x")
    with pytest.raises(CAPError) as caught:
        convert_checkpoint(tmp_path / "x", tmp_path / "m")
    assert line in str(caught.value)
    assert "partial" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_is_not_converted_into_itself(tmp_path):
    save_bitmask(make_sparse(), tmp_path / "x")
    before = (tmp_path / "x" / "model.safetensors").read_bytes()
    with pytest.raises(CAPError, match="is the checkpoint itself"):
        convert_checkpoint(tmp_path / "x", tmp_path / "x")
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before


def test_memory_is_asked_for_before_weights_are_made(tmp_path, monkeypatch):
    save_bitmask(make_sparse(), tmp_path / "x")
    monkeypatch.setattr("cap_hf.checkpoints.files.psutil.virtual_memory", lambda: type("Memory", (), {"available": 9}))
    with pytest.raises(CAPError, match="free some, or distrust the file"):
        convert_checkpoint(tmp_path / "x", tmp_path / "m")


def test_a_config_without_sections_stays_as_it_is(tmp_path):
    config = {"model_type": "vit", "dtype": "float16", "quantization_config": None}
    assert clean_config(config, tmp_path) == ({"model_type": "vit", "dtype": "float16"}, ("quantization_config",))
