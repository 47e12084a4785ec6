"""`cap-hf convert`: what it says, and that every command takes what it wrote."""

import json

import torch
from support.checkpoints import make_model
from support.commands import FAST
from support.foreign import save_bitmask, save_masked

from cap_hf import find_targets
from cap_hf.commands.main import run as run_command


def test_convert_and_what_other_commands_make_of_it(tiny_checkpoint, tmp_path, capsys):
    from cap_hf.checkpoints.loading import load_checkpoint

    model = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        for target in find_targets(model):
            target.weight[target.weight.abs() < target.weight.abs().median()] = 0
    save_masked(model, tmp_path / "x")
    (tmp_path / "x" / "preprocessor_config.json").write_bytes(
        (tiny_checkpoint / "preprocessor_config.json").read_bytes()
    )
    plain = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir"]
    assert run_command("convert", ["--model_name_or_path", str(tmp_path / "x"), *plain[2:], str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    zeros = sum(int((target.weight == 0).sum()) for target in find_targets(model))
    count = sum(target.weight.numel() for target in find_targets(model))
    assert f" {100 * zeros / count:.2f} % of them 0\n" in out
    assert "weights and biases with masks\n" in out
    assert "sparsity %" in out
    assert run_command("inspect", [*plain, str(tmp_path)]) == 0
    assert json.loads((tmp_path / "inspect.json").read_text())["num_zeros"] == zeros
    assert run_command("evaluate", [*plain, str(tmp_path / "e"), "--max_eval_samples", "20"]) == 0
    assert run_command("compress", [*plain, str(tmp_path / "c")]) == 0
    assert "-0.0" not in capsys.readouterr().out
    assert run_command("prune", [*plain, str(tmp_path / "p"), "--sparsity", "0.75", *FAST]) == 0
    finetune = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--max_train_samples", "8"]
    finetune += ["--max_eval_samples", "8", "--report_to", "none"]
    assert run_command("finetune", [*plain, str(tmp_path / "r"), *finetune]) == 0


def test_what_it_says_of_compressed_tensors_and_of_mistakes(tmp_path, capsys):
    save_bitmask(make_model(), tmp_path / "x")
    command = ["--model_name_or_path", str(tmp_path / "x"), "--output_dir", str(tmp_path / "m")]
    assert run_command("convert", command) == 0
    out = capsys.readouterr().out
    assert f"\n{tmp_path / 'm'} is a plain checkpoint: 19 weights of compressed-tensors\n" in out
    assert "Taken out of config.json: quantization_config\n" in out
    assert run_command("convert", command) == 1
    assert "exists" in capsys.readouterr().err
    again = ["--model_name_or_path", str(tmp_path / "m"), "--output_dir", str(tmp_path / "n")]
    assert run_command("convert", again) == 0
    assert "is a plain checkpoint: all weights were whole\n" in capsys.readouterr().out
    assert run_command("convert", ["--model_name_or_path", "no/where", "--output_dir", str(tmp_path / "d")]) == 1
    assert capsys.readouterr().err.startswith("cap-hf convert: no/where is no folder and cannot be downloaded: ")
