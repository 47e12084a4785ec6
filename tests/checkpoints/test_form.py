"""What comes out is stored like what went in: half precision, shards; zeros are those of what is stored."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.backbones import tiny_clip
from support.checkpoints import assert_same_weights, make_model
from transformers import AutoModelForImageClassification, CLIPModel

from cap_hf import CAPCompressor, CAPConfig, CAPError, find_targets
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.form import StoredForm, find_form, round_weights, stored_form, stored_in
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.checkpoints.weights import find_weight_files
from cap_hf.masks import describe_masks

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_form_of_what_is_stored_is_found(tmp_path, dtype):
    model = make_model().to(dtype)
    for target in find_targets(model):
        target.weight.data[:, ::3] = 0
    half = None if dtype == torch.float32 else dtype
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    for name in ("one", "shards"):
        compress_checkpoint(tmp_path / name, tmp_path / f"small-{name}")
    assert stored_form(tmp_path / "one") == stored_form(tmp_path / "small-one") == StoredForm(half)
    form = find_form(str(tmp_path / "shards"))
    assert form == stored_form(tmp_path / "small-shards")
    assert form.dtype == half
    assert 20_000 < form.max_shard_size <= 30_000
    # As many files, with the same tensors in them.
    for compressed in (False, True):
        copy = tmp_path / f"copy-{compressed}"
        save_checkpoint(copy, model.float(), compressed=compressed, form=form)
        names = [path.name for path in find_weight_files(copy).paths]
        assert names == [path.name for path in find_weight_files(tmp_path / ("small-" * compressed + "shards")).paths]
        assert len(names) >= 3
        assert find_weight_files(copy).index.is_file()
        assert_same_weights(
            AutoModelForImageClassification.from_pretrained(copy, dtype="auto"), make_like(model, dtype)
        )
        assert model.dtype == torch.float32


def make_like(model, dtype):
    copied = make_model().to(dtype)
    copied.load_state_dict(model.state_dict())
    return copied


@pytest.mark.parametrize(
    ("main", "head", "said"),
    [
        (torch.bfloat16, torch.float32, "bfloat16 and float32: they are used and saved in float32, which loses not"),
        (torch.float16, torch.bfloat16, "bfloat16 and float16: they are used and saved in float32, which loses not"),
        (torch.float64, torch.float64, "float64: they are used and saved in float32, which rounds float64"),
    ],
)
def test_a_mixture_is_saved_in_float32_and_loses_nothing(tmp_path, caplog, main, head, said):
    model = make_model().to(main)
    model.classifier.to(head)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    form = find_form(str(tmp_path), make_model())
    assert form.dtype is None
    assert form.max_shard_size > 20_000
    (line,) = caplog.messages
    assert f"{tmp_path} has weights in {said}" in line


def test_what_the_model_keeps_in_float32_is_no_mixture(tmp_path, caplog, monkeypatch):
    model = make_model().bfloat16()
    model.classifier.float()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(model, "_keep_in_fp32_modules_strict", {"classifier"})
    assert stored_form(tmp_path, model) == StoredForm(torch.bfloat16)
    monkeypatch.setattr(model, "_keep_in_fp32_modules_strict", {"vit"})
    assert not caplog.messages
    assert stored_form(tmp_path, model) == StoredForm()
    with pytest.raises(CAPError, match=r"nowhere has no config\.json"):
        find_form(str(tmp_path / "nowhere"), local_files_only=True)


def test_where_the_hub_converted_the_weights_the_config_tells(tmp_path, monkeypatch):
    """The weights lie in another snapshot than the config then."""
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    monkeypatch.setattr("cap_hf.checkpoints.form.cached_file", lambda *_, **__: str(tmp_path / "config.json"))
    assert find_form("someone/model") == StoredForm(torch.float16)
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert find_form("someone/model") == StoredForm(None)
    with pytest.raises(CAPError, match="there is no model.safetensors"):
        find_form(str(tmp_path))


def test_rounding_gives_what_a_dtype_holds_and_no_zero_with_a_sign():
    model = make_model()
    weight = model.vit.layers[0].mlp.fc1.weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([0.0, -1e-9, 1e-9, 0.3])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_weights(model, None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    round_weights(model, torch.float16)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name].half().float()), name
    assert weight[0, :3].tolist() == [0, 0, 0]
    assert not torch.signbit(weight[0, :3]).any()


def test_a_module_that_is_not_of_transformers_is_rounded_too():
    layer = torch.nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    round_weights(layer, torch.bfloat16)
    assert torch.equal(layer.weight, before.bfloat16().float())


def test_what_is_too_large_is_one_line_and_changes_nothing():
    model = make_model()
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.bias[3] = -1e6
    before = model.classifier.weight.clone()
    with pytest.raises(CAPError, match=r"vit.layers.1.mlp.fc2.bias holds 1e\+06, too much for torch.float16"):
        round_weights(model, torch.float16)
    assert torch.equal(model.classifier.weight, before)
    round_weights(model, torch.bfloat16)
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.bias[3] = float("inf")  # was there before, and says so itself
    round_weights(model, torch.float16)


def test_modules_that_transformers_keeps_in_float32_stay_so(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model, "_keep_in_fp32_modules_strict", {"classifier"})
    round_weights(model, torch.bfloat16)
    assert not torch.equal(model.classifier.weight, model.classifier.weight.bfloat16().float())
    save_checkpoint(tmp_path / "m", model, form=StoredForm(torch.bfloat16))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    dtypes = {name: value.dtype for name, value in stored.items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert torch.equal(stored["classifier.weight"], model.classifier.weight)


def test_the_config_of_a_tower_says_it_too_and_is_as_before_afterwards(tmp_path):
    model = tiny_clip()
    before = [model.config.dtype, model.config.vision_config.dtype]
    with stored_in(model, torch.bfloat16):
        assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}
        model.save_pretrained(tmp_path)
    assert [model.config.dtype, model.config.vision_config.dtype] == before
    assert model.dtype == torch.float32
    loaded = CLIPModel.from_pretrained(tmp_path, dtype="auto")
    assert {loaded.dtype, loaded.vision_model.dtype, loaded.config.vision_config.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_compressor_reports_the_zeros_of_what_it_saves(tmp_path, dtype, compressed):
    """Also those that float16 makes of what is too small for it."""
    model = make_model()
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight[:, :4] *= 1e-7
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", exclude=["*.fc1"]), disable_tqdm=True, dtype=dtype)
    # fc1 is rounded and not pruned.
    for sparsity in (0.5, 0.7):
        report = compressor.prune(sparsity)
        compressor.save_pretrained(tmp_path / "m", compressed=compressed, max_shard_size="40KB")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "m", dtype="auto")
        assert loaded.dtype == dtype
        assert loaded.config.dtype == dtype
        assert len(find_weight_files(tmp_path / "m").paths) > 1
        found = {layer["name"]: layer for layer in describe_masks(find_targets(loaded))}
        for layer in report.layers:
            assert (layer.num_zeros, layer.mask_digest) == (
                found[layer.name]["num_zeros"],
                found[layer.name]["mask_digest"],
            )
        assert_same_weights(loaded.float(), model)
    assert (found["vit.layers.0.mlp.fc1"]["num_zeros"] > 0) == (dtype == torch.float16)


def test_a_compressor_changes_nothing_where_a_weight_does_not_fit():
    """Outside the targets or in them; a target that is too large before it is pruned may fit afterwards."""
    model = make_model()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True, dtype=torch.float16)
    for tensor in (model.classifier.bias, model.vit.layers[0].mlp.fc1.weight):
        with torch.no_grad():
            tensor.view(-1)[0] = 1e6
        compressor.collect([])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CAPError, match=r"holds 1e\+06, too much for .*float16.*: store it in bfloat16 or float32"):
            compressor.prune(0.5)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert compressor.report is None
        with torch.no_grad():
            tensor.view(-1)[0] = 0
    solved = compressor.paths.reconstruct

    def clamped(*args):
        ((blocks, losses),) = solved(*args)
        return [({name: each.clamp(-1, 1) for name, each in blocks.items()}, losses)]

    compressor.paths.reconstruct = clamped
    assert compressor.prune(0.5).sparsity == 0.5


def test_metadata_of_a_foreign_file_is_no_trouble(tmp_path):
    save_file({"a": torch.zeros(4, dtype=torch.int64)}, tmp_path / "model.safetensors")
    assert stored_form(tmp_path) == StoredForm()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() is None
