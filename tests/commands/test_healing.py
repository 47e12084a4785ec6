"""`cap-hf prune --heal_steps`: each sparsity is healed from the dense model, and the report says so."""

import json

import pytest
import torch
from support.backbones import backbone_checkpoint, tiny_dinov2
from support.checkpoints import assert_same_weights
from support.commands import image_folder, prune
from support.launching import dense_checkpoint
from support.models import build
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from cap_hf.checkpoints.folder import read_report
from cap_hf.commands.healing import HealArguments
from cap_hf.errors import CAPError
from cap_hf.hub.card import CardFacts
from cap_hf.masks import differing_layers
from cap_hf.targets import find_targets

HEAL = ("--heal_steps", "30", "--heal_batch_size", "16", "--heal_learning_rate", "1e-3")


def test_each_sparsity_is_healed_from_the_dense_model(tmp_path, capsys):
    start = dense_checkpoint(tmp_path / "dense")
    assert prune(start, tmp_path / "both", "--sparsity", "0.5", "0.9", *HEAL) == 0
    assert prune(start, tmp_path / "one", "--sparsity", "0.9", *HEAL) == 0
    assert prune(start, tmp_path / "plain", "--sparsity", "0.9") == 0
    capsys.readouterr()
    load = AutoModelForImageClassification.from_pretrained
    both, one, plain = (load(tmp_path / name / "sparsity-0.9") for name in ("both", "one", "plain"))
    # What the first sparsity has moved, biases and norms too, is back before the second.
    assert_same_weights(both, one)
    dense, bias = load(start), "vit.layers.0.layernorm_before.bias"
    assert torch.equal(both.classifier.weight, dense.classifier.weight)
    assert not torch.equal(both.get_parameter(bias), dense.get_parameter(bias))
    for healed, pruned in zip(find_targets(both), find_targets(plain), strict=True):
        assert torch.equal(healed.weight == 0, pruned.weight == 0), healed.name
        assert torch.equal(healed.weight, pruned.weight) == (not pruned.weight.any())
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert "heal 0.5" in {phase["phase"] for phase in report["phases"]}
    for result in report["results"]:
        done = result["healing"]
        assert (done["steps"], done["batch_size"], done["images"], done["learning_rate"]) == (30, 16, 480, 1e-3)
        assert 0 < done["loss_end"] < done["loss_start"]
        folder = tmp_path / "both" / result["checkpoint"]
        assert differing_layers(find_targets(load(folder)), read_report(folder)) == []
    assert json.loads((tmp_path / "plain" / "report.json").read_text())["results"][0]["healing"] is None
    content = CardFacts.gather(tmp_path / "both" / "sparsity-0.9", "user/vit").render().content
    assert "healed: trained for 30 steps on 480 images, without labels, towards what the model before" in content
    assert " --heal_steps 30 --heal_batch_size 16 --heal_learning_rate 0.001" in content
    # Nothing of the Trainer's is left.
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "both", "one", "plain"}


def test_a_backbone_stored_in_half_precision_is_healed_without_labels(tmp_path):
    dense = backbone_checkpoint(tmp_path / "dense", tiny_dinov2(num_channels=1, patch_size=2).half())
    data = image_folder(tmp_path / "data", ("train", "test"), ("",))
    found = []
    for name, options in (("plain", ()), ("healed", HEAL)):
        values = ("--sparsity", "0.5", "--dataset_name", str(data), "--method", "magnitude", *options)
        assert prune(dense, tmp_path / name, *values) == 0
        (result,) = json.loads((tmp_path / name / "report.json").read_text())["results"]
        found.append(result["sparse"]["cosine"])
    assert found[0] < found[1] <= 1
    assert result["healing"]["images"] == 1
    folder = tmp_path / "healed" / "sparsity-0.5"
    model = AutoModel.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert differing_layers(find_targets(model), read_report(folder)) == []


def test_batch_norm_is_put_back_too(tiny_checkpoint, tmp_path):
    build("ResNet", num_channels=1).save_pretrained(tmp_path / "resnet")
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "resnet")
    few = ("--method", "magnitude", "--do_eval", "false", "--heal_steps", "2", "--recalibrate_batch_norm", "false")
    assert prune(tmp_path / "resnet", tmp_path / "both", "--sparsity", "0.2", "0.5", *few) == 0
    assert prune(tmp_path / "resnet", tmp_path / "one", "--sparsity", "0.5", *few) == 0
    models = [
        AutoModelForImageClassification.from_pretrained(tmp_path / name / "sparsity-0.5") for name in ("both", "one")
    ]
    assert_same_weights(*models)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heal_steps", "-1"], "heal_steps=-1 must be at least 0"),
        (["--heal_batch_size", "0"], "heal_batch_size=0 must be at least 1"),
        (["--heal_bf16", "true"], "nothing is healed without --heal_steps"),
        (["--heal_batch_size", "8"], "nothing is healed without --heal_steps"),
        (["--heal_learning_rate", "0"], "heal_learning_rate=0.0 must be greater than 0, and finite"),
    ],
)
def test_a_mistake_is_one_line(tiny_checkpoint, tmp_path, capsys, arguments, message):
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_healed_is_found_before_the_collection(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    model = AutoModelForImageClassification.from_pretrained(tiny_checkpoint)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "many")
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "many")
    data = image_folder(tmp_path / "data", ("train", "test"), ("",))
    monkeypatch.setattr("cap_hf.compressor.CAPCompressor.collect", None)
    values = ("--sparsity", "0.5", "--dataset_name", str(data), "--do_eval", "false", "--heal_steps", "2")
    assert prune(tmp_path / "many", tmp_path / "out", *values) == 1
    assert "healing is for models that pick one label of several" in capsys.readouterr().err


def test_bfloat16_is_refused_before_any_work_where_it_is_slow(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cap_hf.recovery.precision.bfloat16_ratio", lambda: 15.0)
    monkeypatch.setattr("cap_hf.compressor.CAPCompressor.collect", None)
    values = ("--sparsity", "0.5", "--do_eval", "false", "--heal_steps", "2", "--heal_bf16", "true")
    assert prune(tiny_checkpoint, tmp_path / "out", *values) == 1
    assert (
        "bfloat16 takes this processor 15.0 times as long as float32: leave out --heal_bf16 (fast"
        in capsys.readouterr().err
    )


def test_how_many_images_are_needed():
    assert HealArguments(heal_steps=3, heal_batch_size=5).num_images(2) == 30
    assert HealArguments().num_images(2) == 0
    with pytest.raises(CAPError, match="greater than 0, and finite"):
        HealArguments(heal_learning_rate=float("nan"))
