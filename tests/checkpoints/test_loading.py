"""A checkpoint is loaded whole or not at all, and its code runs only if it is trusted."""

import builtins
import json

import pytest
import torch
from support.backbones import IMAGE, TINY, tiny_clip, tiny_dinov2
from support.checkpoints import assert_same_weights, make_checkpoint, make_custom_checkpoint, make_processor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTConfig,
    ViTModel,
    ViTMSNConfig,
    pipeline,
    set_seed,
)

from cap_hf import CAPCompressor, CAPConfig, CAPError, SparseAutoModel
from cap_hf.checkpoints import loading
from cap_hf.checkpoints.loading import check_folder, find_companions, load_checkpoint, local_folder, model_class
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.inference.linear import SparseWeightLinear


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder / "m", make_checkpoint(folder / "m", compressed=True)


def change_config(folder, destination, **changes):
    destination.mkdir()
    for path in folder.iterdir():
        (destination / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text()) | changes
    (destination / "config.json").unlink()
    (destination / "config.json").write_text(json.dumps(config))
    return destination


def test_loads_in_the_dtype_asked_for(saved):
    folder, model = saved
    assert check_folder(folder).compressed
    assert_same_weights(load_checkpoint(folder), model)
    assert load_checkpoint(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"hidden_size": 10**6}, "for .* parameters, and weights for 40,803"),
        ({"intermediate_size": 10**10}, "for .* parameters, and weights for 40,803"),
        ({"num_hidden_layers": 10**9}, "asks for 1000000000 num_hidden_layers"),
        ({"hidden_size": 2**63}, "cannot be loaded"),
        ({"hidden_size": -48}, "cannot be loaded"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"hidden_size": "48"}, "cannot be loaded"),
        ({"model_type": "no such"}, "is a 'no such', which this version of transformers does not know"),
        ({"quantization_config": []}, "cannot be loaded"),
    ],
)
def test_a_config_that_asks_for_what_is_not_there_takes_no_memory(saved, changes, error, tmp_path, capfd):
    folder = change_config(saved[0], tmp_path / "m", **changes)
    with pytest.raises(CAPError, match=error) as raised:
        load_checkpoint(folder) if check_folder(folder) else None
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""  # no report of many lines


def test_weights_that_are_missing_or_of_another_shape_are_named(saved, tmp_path, capfd):
    folder = change_config(saved[0], tmp_path / "a", num_hidden_layers=3)
    with pytest.raises(CAPError, match=r"has no weights for vit\.layers\.2\.attention.* \.\.\. \(\d+ in all\)"):
        load_checkpoint(folder)
    folder = change_config(saved[0], tmp_path / "b", patch_size=2)
    with pytest.raises(CAPError, match=r"of another shape than its config\.json asks for, .*: vit\.embeddings\.patch"):
        load_checkpoint(folder)
    assert "REPORT" not in capfd.readouterr().err


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    make_custom_checkpoint(tmp_path / "m")

    def asked(*_):
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    for call in (check_folder, load_checkpoint):
        with pytest.raises(CAPError, match="brings code of its own along.* --trust_remote_code true"):
            call(tmp_path / "m")
    check_folder(tmp_path / "m", trust_remote_code=True)
    assert type(load_checkpoint(tmp_path / "m", trust_remote_code=True)).__name__ == "OwnClassifier"


def test_a_folder_stays_and_a_name_that_cannot_be_downloaded_is_one_line(tmp_path):
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(CAPError, match="no/where is no folder and cannot be downloaded") as error:
        local_folder("no/where")
    assert "\n" not in str(error.value)


def test_the_config_says_which_class_is_loaded():
    assert model_class(ViTConfig(architectures=["ViTModel"])) is ViTModel
    assert model_class(ViTConfig(architectures=["DeiTForImageClassificationWithTeacher"])).__name__.endswith("Teacher")
    assert model_class(ViTConfig()) is AutoModelForImageClassification
    assert model_class(ViTConfig(architectures=["TFViTModel"])) is AutoModelForImageClassification
    assert model_class(PreTrainedConfig()) is AutoModel
    own = ViTMSNConfig(architectures=["Own"])
    own.auto_map = {"AutoModel": "own.Own"}
    assert model_class(own, trust_remote_code=True) is AutoModel


@pytest.mark.parametrize("compressed", [False, True])
def test_a_backbone_comes_out_as_what_it_went_in(tmp_path, compressed):
    model = tiny_dinov2()
    compressor = CAPCompressor(model, CAPConfig(num_grads=8))
    compressor.collect([{"pixel_values": torch.randn(8, 3, 8, 8)}]).prune(0.75)
    compressor.save_pretrained(tmp_path / "pruned", compressed=compressed)
    check_folder(tmp_path / "pruned")
    pixels = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state
        for loaded in (load_checkpoint(tmp_path / "pruned"), AutoModel.from_pretrained(tmp_path / "pruned")):
            assert type(loaded) is type(model)
            assert torch.equal(loaded(pixel_values=pixels).last_hidden_state, expected)
        sparse = SparseAutoModel.from_pretrained(tmp_path / "pruned", backend="csr")
        assert any(isinstance(module, SparseWeightLinear) for module in sparse.modules())
        torch.testing.assert_close(sparse(pixel_values=pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_extracts_the_features_of_a_pruned_backbone(tmp_path):
    from PIL import Image

    model, processor = tiny_dinov2(image_size=32, patch_size=8), make_processor()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"))
    compressor.prune(0.5)
    compressor.save_pretrained(tmp_path / "m", processor)
    extract = pipeline("image-feature-extraction", model=str(tmp_path / "m"))
    image = Image.new("RGB", (32, 32), "red")
    pixels = extract.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(torch.tensor(extract(image)), expected)


def test_a_pooler_without_weights_is_left_out_not_made_up(tmp_path):
    set_seed(0)
    model = ViTModel(ViTConfig(**TINY, **IMAGE), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.pooler is None
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_text_tower_is_unchanged_bit_for_bit(tmp_path, compressed):
    model = tiny_clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compressor = CAPCompressor(model, CAPConfig(num_grads=8))
    report = compressor.collect([{"pixel_values": torch.randn(8, 3, 8, 8)}]).prune(0.5)
    compressor.save_pretrained(tmp_path / "m", compressed=compressed)
    after = load_checkpoint(tmp_path / "m").state_dict()
    pruned = {f"{layer.name}.weight" for layer in report.layers}
    assert all(name.startswith("vision_model.") for name in pruned)
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name not in pruned), name


def test_what_belongs_to_a_checkpoint_is_found_and_checked(tmp_path):
    assert find_companions(tmp_path) == []
    (tmp_path / "m").mkdir()
    for name in ("tokenizer.json", "vocab.txt", "config.json", "notes.txt", "model.bin"):
        (tmp_path / "m" / name).write_text("{}")
    assert [path.name for path in find_companions(tmp_path / "m")] == ["tokenizer.json", "vocab.txt"]
    save_checkpoint(tmp_path / "out", tiny_dinov2(), companions=find_companions(tmp_path / "m"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    }
    (tmp_path / "m" / "tokenizer.json").write_text("ssh-rsa AAAA")
    with pytest.raises(CAPError, match=r"tokenizer\.json cannot be read"):
        find_companions(tmp_path / "m")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CAPError, match=r"tokenizer\.json is a link out of its folder"):
        find_companions(tmp_path / "m")


def test_a_hub_that_fails_when_it_is_asked_for_a_tokenizer_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no\nroute")

    monkeypatch.setattr(loading, "cached_files", fail)
    with pytest.raises(CAPError, match="^user/m cannot be asked for its tokenizer: no route$"):
        find_companions("user/m")
