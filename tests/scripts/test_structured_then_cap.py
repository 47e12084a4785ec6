"""Structured pruning, then CAP: the recipe removes what it says and nothing else."""

import copy
import json

import pytest
import torch
from support.models import build, random_batches
from support.scripts import load_script, run_script
from transformers import AutoModelForImageClassification

from cap_hf import CAPCompressor, CAPConfig, CAPError, find_targets, optimize_for_inference

pytest.importorskip("torch_pruning")
recipe = load_script("recipes/structured_then_cap.py")


@torch.inference_mode()
def logits(model, batch):
    return model(pixel_values=batch["pixel_values"]).logits


def test_narrow_model_equals_one_with_those_units_silenced():
    model = build("ViT")
    (batch,) = random_batches(model, 8, (4,))
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for layer in silenced.vit.layers:
            fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
            least = (fc1.weight.norm(dim=1) * fc2.weight.norm(dim=0)).argsort()[:8]
            fc2.weight[:, least] = 0
    recipe.narrow_mlps(model, 0.25)
    assert model.config.intermediate_size == 24
    assert {tuple(layer.mlp.fc1.weight.shape) for layer in model.vit.layers} == {(24, 16)}
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(model, batch), logits(silenced, batch), rtol=1e-4, atol=1e-5)


def test_cap_prunes_what_is_left_and_the_checkpoint_loads(tmp_path):
    model = recipe.narrow_mlps(build("DeiT"), 0.5)
    batches = random_batches(model, 8)
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True)
    compressor.collect(batches)
    compressor.prune(0.75)
    zeros = sum(int((target.weight == 0).sum()) for target in find_targets(model))
    weights = sum(target.weight.numel() for target in find_targets(model))
    assert zeros == round(0.75 * weights)
    compressor.save_pretrained(tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["intermediate_size"] == 16
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(logits(again, batches[0]), logits(model, batches[0]))
    optimize_for_inference(again, "kernel")
    torch.testing.assert_close(logits(again, batches[0]), logits(model, batches[0]), rtol=1e-4, atol=1e-4)


def test_models_without_such_mlps_are_refused():
    with pytest.raises(CAPError, match="no intermediate_size"):
        recipe.narrow_mlps(build("ResNet"), 0.5)
    # DINOv2's gated MLP has an intermediate_size of another meaning.
    with pytest.raises(CAPError, match="no MLP of two Linear|no intermediate_size"):
        recipe.narrow_mlps(build("Dinov2"), 0.5)


def test_recipe_runs_on_a_checkpoint(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--sparsity", "0.5", "--dataset_name", "digits", "--num_grads", "16", "--disable_tqdm", "True"]
    where = ["--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "out"]
    run_script("recipes/structured_then_cap.py", *where, *arguments, monkeypatch=monkeypatch)
    assert "MLPs of 24 units" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "pruned" / "report.json").read_text())
    assert report["dense"]["num_examples"] > 0
    assert (tmp_path / "out" / "pruned" / "sparsity-0.5" / "model.safetensors").exists()
