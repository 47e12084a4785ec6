"""Half precision and shards go in and come out, through every command; the figures are those of what was saved."""

import json

import pytest
import torch
from support.commands import prune, without_drops
from transformers import AutoImageProcessor, AutoModelForImageClassification

from cap_hf import find_targets
from cap_hf.checkpoints.weights import find_weight_files
from cap_hf.collection.removal_paths import RemovalPaths
from cap_hf.commands.main import main
from cap_hf.masks import describe_masks, target_sparsity

DATA = ["--max_eval_samples", "50", "--disable_tqdm", "True"]


def run(command, model, output, *arguments):
    names = ["--model_name_or_path", str(model), "--output_dir", str(output)]
    assert main([command, *names, *arguments]) == 0


def stored(folder, dtype, shards=None):
    """Load a checkpoint as transformers finds it, once its dtype and its files are what was expected."""
    model = AutoModelForImageClassification.from_pretrained(folder, dtype="auto")
    assert model.dtype == dtype
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    if shards:
        files = find_weight_files(folder)
        assert (len(files.paths), files.index is not None) == (shards, shards > 1)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_shards_all_the_way_to_the_hub(tiny_checkpoint, tiny_vit, tmp_path, capsys, dtype):
    half = tmp_path / "half"
    tiny_vit.to(dtype).save_pretrained(half, max_shard_size="5KB")
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(half)
    shards = len(find_weight_files(half).paths)
    assert shards > 1
    assert prune(half, tmp_path / "out", "--sparsity", "0.5", "0.9") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sparsity_dense"] == target_sparsity(find_targets(tiny_vit)) < 0.01
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:3]] == [["dense", "0.00"]]
    for result in report["results"]:
        folder = tmp_path / "out" / result["checkpoint"]
        layers = describe_masks(find_targets(stored(folder, dtype, shards)))
        keys = ("name", "num_zeros", "mask_digest")
        assert [[layer[key] for key in keys] for layer in layers] == [
            [layer[key] for key in keys] for layer in result["pruning"]["layers"]
        ]
        run("evaluate", folder, tmp_path / "evaluated", *DATA)
        evaluated = json.loads((tmp_path / "evaluated" / "eval_results.json").read_text())
        assert evaluated["metrics"] == without_drops(result["sparse"])
        assert evaluated["sparsity"] == result["pruning"]["sparsity"]
    run("inspect", folder, tmp_path / "inspected")
    assert json.loads((tmp_path / "inspected" / "inspect.json").read_text())["layers_unlike_report"] == []
    run("compress", folder, tmp_path / "small")
    run("push", tmp_path / "small", tmp_path / "ready", "--dry_run", "true", "--hub_model_id", "user/x")
    for name in ("small", "ready"):
        stored(tmp_path / name, dtype, shards)
    # What is recovered, from the compressed one too, is stored as its student was.
    training = ["--max_train_samples", "32", "--max_steps", "2", "--use_cpu", "True", "--learning_rate", "1e-2", *DATA]
    for student in (folder, tmp_path / "small"):
        run("finetune", student, tmp_path / "recovered", *training, "--overwrite_output_dir")
        recovered = stored(tmp_path / "recovered", dtype, shards)
        found = json.loads((tmp_path / "recovered" / "report.json").read_text())
        assert [layer["mask_digest"] for layer in found["layers"]] == [
            layer["mask_digest"] for layer in describe_masks(find_targets(recovered))
        ]
        run("evaluate", tmp_path / "recovered", tmp_path / "evaluated", *DATA)
        evaluated = json.loads((tmp_path / "evaluated" / "eval_results.json").read_text())
        assert evaluated["metrics"] == found["recovered"]


def test_a_plain_checkpoint_stays_in_one_file_of_float32(tiny_checkpoint, tmp_path, capsys):
    """And the summary says how sparse the one was that went in."""
    assert prune(tiny_checkpoint, tmp_path / "a", "--sparsity", "0.5") == 0
    stored(tmp_path / "a" / "sparsity-0.5", torch.float32, 1)
    capsys.readouterr()
    assert prune(tmp_path / "a" / "sparsity-0.5", tmp_path / "b", "--sparsity", "0.75") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["dense", "50.00"],
        ["sparsity-0.75", "75.00"],
    ]
    names = ["--dense_model_name_or_path", str(tmp_path / "a" / "sparsity-0.5")]
    run("evaluate", tmp_path / "b" / "sparsity-0.75", tmp_path / "evaluated", *names, *DATA)
    table = capsys.readouterr().out.splitlines()
    assert "(dense)" in table[2]
    assert " 50.00 " in table[2]
    assert " 75.00 " in table[3]


def test_training_is_not_lost_to_a_weight_too_large_for_float16(tiny_checkpoint, tiny_vit, tmp_path, capsys, caplog):
    """It is saved in float32, with the weights that it has."""
    half = tmp_path / "half"
    tiny_vit.half().save_pretrained(half)
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(half)
    training = ["--max_train_samples", "32", "--max_steps", "1", "--use_cpu", "True", "--learning_rate", "1e6", *DATA]
    run("finetune", half, tmp_path / "out", *training, "--optim", "sgd", "--max_grad_norm", "1e6")
    (line,) = [each.message for each in caplog.records if "too much for" in each.message]
    assert "too much for torch.float16, which the checkpoint is stored in: it is saved in float32 instead" in line
    recovered = stored(tmp_path / "out", torch.float32)
    assert recovered.get_parameter(line.split()[0]).abs().max() > torch.finfo(torch.float16).max


def test_a_sparsity_that_does_not_fit_leaves_those_before_it(tiny_checkpoint, tiny_vit, tmp_path, capsys, monkeypatch):
    half = tmp_path / "half"
    tiny_vit.half().save_pretrained(half)
    AutoImageProcessor.from_pretrained(tiny_checkpoint).save_pretrained(half)
    reconstruct = RemovalPaths.reconstruct

    def huge(self, counts, advance):
        """As a joint reconstruction may be that removes many weights."""
        half, (blocks, losses) = reconstruct(self, counts, advance)
        return [half, ({name: each * 1e7 for name, each in blocks.items()}, losses)]

    monkeypatch.setattr(RemovalPaths, "reconstruct", huge)
    assert prune(half, tmp_path / "out", "--sparsity", "0.5", "0.9") == 1
    assert "too much for torch.float16" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sparsity-0.5"]
    stored(tmp_path / "out" / "sparsity-0.5", torch.float16)
