"""`cap-hf compress`, and what `cap-hf inspect` and `push` say of what it wrote."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint, make_int8_checkpoints, make_model, round_to_int8
from support.commands import FAST, prune

from cap_hf import find_targets
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.loading import load_checkpoint
from cap_hf.commands.main import run as run_command


def test_compress_and_inspect_commands(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "m")
    arguments = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir"]
    assert run_command("compress", [*arguments, str(tmp_path / "c")]) == 0
    assert "bytes of weights" in capsys.readouterr().out
    assert run_command("compress", [*arguments, str(tmp_path / "c")]) == 1
    assert "exists" in capsys.readouterr().err
    assert run_command("inspect", ["--model_name_or_path", str(tmp_path / "c"), "--output_dir", str(tmp_path)]) == 0
    assert "those of its report" in capsys.readouterr().out
    # As many zeros as before, one of them in another place.
    weights = model.vit.layers[1].mlp.fc2.weight.detach().view(-1)
    zero, other = int((weights == 0).nonzero()[0]), int((weights != 0).nonzero()[0])
    weights[zero], weights[other] = weights[other].clone(), 0
    model.save_pretrained(tmp_path / "m")
    assert run_command("inspect", [*arguments, str(tmp_path)]) == 0
    assert "NOT those of its report in vit.layers.1.mlp.fc2\n" in capsys.readouterr().out
    assert run_command("push", [*arguments, str(tmp_path / "p"), "--hub_model_id", "a/b", "--dry_run"]) == 1
    assert "is not about these weights (vit.layers.1.mlp.fc2 has other zeros)" in capsys.readouterr().err
    assert run_command("compress", ["--model_name_or_path", "no/where", "--output_dir", str(tmp_path / "d")]) == 1
    assert capsys.readouterr().err.startswith("cap-hf compress: no/where is no folder and cannot be downloaded: ")


def test_compress_tells_of_zeros_with_a_sign(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "m")
    weight = model.vit.layers[0].mlp.fc1.weight
    zeros = (weight == 0).nonzero()
    weight.data[zeros[:7, 0], zeros[:7, 1]] = -0.0
    model.save_pretrained(tmp_path / "m")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 0
    assert "\n7 zeros are -0.0" in capsys.readouterr().out
    weight.data[weight == 0] = 0
    model.save_pretrained(tmp_path / "m")
    assert run_command("compress", [*command, "--overwrite_output_dir", "true"]) == 0
    assert "-0.0" not in capsys.readouterr().out


def lacking(folder, tensors):
    del tensors["vit.layernorm.weight"]


def prefixed(folder, tensors):
    for name in list(tensors):
        tensors["module." + name] = tensors.pop(name)


def adapted(folder, tensors):
    (folder / "adapter_config.json").write_text("{}")


def reshaped(folder, tensors):
    tensors["classifier.bias"] = tensors["classifier.bias"][:2].clone()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lacking, "has no weights for vit.layernorm.weight"),
        (prefixed, "begin with 'module.'"),
        (adapted, "has an adapter"),
        (reshaped, "has a head of 2 classes"),
    ],
)
def test_what_no_command_can_load_is_not_compressed(spoil, line, tmp_path, capsys):
    make_checkpoint(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    spoil(tmp_path / "m", tensors)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 1
    assert line in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_model_that_cannot_be_built_here_is_compressed_unseen(tmp_path, capsys, caplog):
    """Its package is not installed, or its code may not run."""
    make_checkpoint(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "own.py").write_text("")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 0
    assert "It was not checked whether all weights are there: " in caplog.text
    assert (tmp_path / "c" / "own.py").is_file()


def test_int8_and_what_the_other_commands_say_of_it(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "m", pattern="1x4")
    source = ["--model_name_or_path", str(tmp_path / "m")]
    command = [*source, "--dtype", "int8", "--output_dir", str(tmp_path / "c")]
    assert run_command("compress", command) == 0
    out = capsys.readouterr().out
    assert "bytes of weights" in out
    assert "Weights were rounded, so evaluate it; SparseAutoModel.from_pretrained(..., runtime='int8') computes" in out
    assert (tmp_path / "c" / "report.json").read_text() == (tmp_path / "m" / "report.json").read_text()
    assert run_command("compress", command) == 1
    assert "exists" in capsys.readouterr().err
    rounded = ["--model_name_or_path", str(tmp_path / "c"), "--output_dir"]
    assert run_command("inspect", [*rounded, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bytes, compressed, in int8: " in out
    assert "SparseAutoModel.from_pretrained(..., runtime='int8') computes with them as they are" in out
    assert "The zeros of every layer are those of its report, and those that rounding to int8 has made" in out
    report = json.loads((tmp_path / "inspect.json").read_text())
    assert report["int8"] is report["compressed"] is report["digests_checked"] is True
    assert report["file_bytes"] < report["compressed_bytes"] < report["dense_bytes"]
    zeros = sum(int((target.weight == 0).sum()) for target in find_targets(round_to_int8(model)))
    assert report["num_zeros"] == zeros
    for arguments in (rounded, [*rounded[:2], "--dtype", "int8", "--output_dir"]):
        assert run_command("compress", [*arguments, str(tmp_path / "d")]) == 1
        assert f"{tmp_path / 'c'} is compressed in int8 already" in capsys.readouterr().err
    # Other zeros than its report tells of are still seen.
    weights = model.vit.layers[1].mlp.fc2.weight.detach()
    weights[:, :48] = torch.randn(48, 48)
    model.save_pretrained(tmp_path / "m")
    assert run_command("compress", [*command, "--overwrite_output_dir", "true"]) == 0
    capsys.readouterr()
    assert run_command("inspect", [*rounded, str(tmp_path)]) == 0
    assert "NOT those of its report in vit.layers.1.mlp.fc2\n" in capsys.readouterr().out
    assert run_command("push", [*rounded, str(tmp_path / "p"), "--hub_model_id", "a/b", "--dry_run"]) == 1
    assert "is not about these weights (vit.layers.1.mlp.fc2 has other zeros)" in capsys.readouterr().err


def test_int8_is_published_as_it_is_and_the_card_says_so(tmp_path, capsys):
    make_int8_checkpoints(tmp_path)
    for compressed in ("true", "false"):
        command = ["--model_name_or_path", str(tmp_path / "int8"), "--hub_model_id", "a/b", "--compressed", compressed]
        command += ["--dry_run", "--output_dir", str(tmp_path / "push"), "--overwrite_output_dir"]
        assert run_command("push", command) == 0, capsys.readouterr().err
        with (
            safe_open(tmp_path / "push" / "model.cap.safetensors", "pt") as published,
            safe_open(tmp_path / "int8" / "model.cap.safetensors", "pt") as stored,
        ):
            assert published.metadata()["cap_digests"] == stored.metadata()["cap_digests"]
        card = (tmp_path / "push" / "README.md").read_text()
        for said in (
            "- int8\n",
            "- 1x4\n",
            "--pattern 1x4 --sparsity 0.75",
            "are rounded to int8, with a scale per row",
            "This was measured before the weights were rounded to int8.",
            "(compressed, in int8)",
            "import cap_hf\nfrom transformers import AutoImageProcessor, AutoModelForImageClassification\n",
            'SparseAutoModel.from_pretrained("a/b", runtime="int8")',
        ):
            assert said in card
        assert 'SparseAutoModel.from_pretrained("a/b")' not in card


def test_int8_of_a_checkpoint_without_zeros_is_one_line(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "m")
    command = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "c"), "--dtype", "int8"]
    assert run_command("compress", command) == 1
    assert "has nothing to store in int8: no Linear layer is 1 % zeros and" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert run_command("compress", [*command[:-1], "int4"]) == 1
    assert "invalid choice: 'int4'" in capsys.readouterr().err


def test_other_commands_take_the_floats_that_int8_stands_for(tiny_checkpoint, tmp_path, capsys):
    """As they take those of any compressed checkpoint: evaluated, pruned further and recovered alike."""
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.75", "--pattern", "1x4", "--no_do_eval") == 0
    pruned, folders = tmp_path / "out" / "sparsity-0.75", {}
    compress_checkpoint(pruned, tmp_path / "int8", int8=True)
    round_to_int8(load_checkpoint(pruned)).save_pretrained(tmp_path / "floats")
    for name in ("config.json", "preprocessor_config.json"):
        if not (tmp_path / "floats" / name).exists():
            shutil.copy(pruned / name, tmp_path / "floats" / name)
    capsys.readouterr()
    for name in ("int8", "floats"):
        model = ["--model_name_or_path", str(tmp_path / name), "--output_dir"]
        folders[name] = tmp_path / f"of-{name}"
        assert run_command("evaluate", [*model, str(folders[name]), "--max_eval_samples", "50"]) == 0
        assert run_command("prune", [*model, str(folders[name] / "pruned"), "--sparsity", "0.9", *FAST]) == 0
        finetune = [*model, str(folders[name] / "recovered"), "--max_steps", "2", "--per_device_train_batch_size", "4"]
        finetune += ["--max_train_samples", "8", "--max_eval_samples", "8", "--report_to", "none"]
        assert run_command("finetune", finetune) == 0, capsys.readouterr().err
    metrics = [json.loads((folder / "eval_results.json").read_text())["metrics"] for folder in folders.values()]
    assert metrics[0] == metrics[1]
    for name in ("pruned/sparsity-0.9", "recovered"):
        one, other = (load_checkpoint(folder / name).state_dict() for folder in folders.values())
        assert (folders["int8"] / name / "model.safetensors").is_file()
        assert all(torch.equal(one[key], other[key]) for key in other), name
