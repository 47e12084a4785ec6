"""The command line as a user meets it: results, reports, second runs, one-line errors."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTModel

from cap_hf import CAPConfig, find_targets
from cap_hf.commands import demo
from cap_hf.commands.main import COMMANDS, main

FAST = ["--num_grads", "32", "--max_eval_samples", "50", "--disable_tqdm"]


def prune(model, output, *arguments) -> int:
    return main(["prune", "--model_name_or_path", str(model), "--output_dir", str(output), *FAST, *arguments])


def test_prune_writes_checkpoints_and_a_report(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    assert prune(tiny_checkpoint, output, "--sparsity", "0.9", "0.5") == 0
    printed = capsys.readouterr().out
    assert "sparsity-0.5" in printed
    assert "dense" in printed
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "sparsity-0.5", "sparsity-0.9"]
    report = json.loads((output / "report.json").read_text())
    assert [result["checkpoint"] for result in report["results"]] == ["sparsity-0.5", "sparsity-0.9"]
    assert report["dense"]["num_examples"] == 50
    assert report["seed"] == 42
    assert {"torch", "transformers", "python"} <= report["versions"].keys()
    phases = {record["phase"]: record for record in report["phases"]}
    assert {"load", "collect", "prune 0.5", "evaluate dense", "evaluate 0.9"} <= phases.keys()
    assert all(record["seconds"] >= 0 and record["peak_memory_bytes"]["cpu"] > 0 for record in phases.values())
    for result, sparsity in zip(report["results"], (0.5, 0.9), strict=True):
        folder = output / result["checkpoint"]
        assert {"config.json", "model.safetensors", "preprocessor_config.json", "cap_config.json", "report.json"} == {
            path.name for path in folder.iterdir()
        }
        assert CAPConfig.load(folder).num_grads == 32
        weights = AutoModelForImageClassification.from_pretrained(folder).state_dict()
        zeros = {layer["name"]: layer for layer in result["pruning"]["layers"]}
        for name, layer in zeros.items():
            assert int((weights[f"{name}.weight"] == 0).sum()) == layer["num_zeros"]
            assert layer["block_size"] in (16, 32)
            assert layer["loss"] >= 0
        total = sum(layer["num_weights"] for layer in zeros.values())
        assert sum(layer["num_zeros"] for layer in zeros.values()) == round(total * sparsity)
        assert json.loads((folder / "report.json").read_text())["sparse"] == result["sparse"]
        AutoImageProcessor.from_pretrained(folder)


def test_evaluate_and_inspect_agree_with_the_report(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.75") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    folder = tmp_path / "out" / "sparsity-0.75"
    arguments = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "eval")]
    assert main(["evaluate", *arguments, "--max_eval_samples", "50"]) == 0
    results = json.loads((tmp_path / "eval" / "eval_results.json").read_text())
    assert results["metrics"] == report["results"][0]["sparse"]
    capsys.readouterr()
    assert main(["inspect", *arguments]) == 0
    assert "75.00 % of them 0" in capsys.readouterr().out
    seen = json.loads((tmp_path / "eval" / "inspect.json").read_text())
    assert seen["num_zeros"] == report["results"][0]["pruning"]["num_zeros"]
    assert [layer["name"] for layer in seen["layers"]] == [
        layer["name"] for layer in report["results"][0]["pruning"]["layers"]
    ]


def test_a_pruned_checkpoint_is_pruned_further(tiny_checkpoint, tmp_path):
    assert prune(tiny_checkpoint, tmp_path / "a", "--sparsity", "0.5") == 0
    assert prune(tmp_path / "a" / "sparsity-0.5", tmp_path / "b", "--sparsity", "0.8") == 0
    first, second = (
        AutoModelForImageClassification.from_pretrained(tmp_path / folder)
        for folder in ("a/sparsity-0.5", "b/sparsity-0.8")
    )
    for before, after in zip(find_targets(first), find_targets(second), strict=True):
        assert (after.weight[before.weight == 0] == 0).all()
    assert sum(int((target.weight == 0).sum()) for target in find_targets(second)) > 0


def test_a_second_run_replaces_only_when_asked(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5") == 0
    before = (output / "sparsity-0.5" / "model.safetensors").read_bytes()
    assert prune(tiny_checkpoint, output, "--sparsity", "0.5", "--method", "magnitude") == 1
    assert "exists: choose another --output_dir or pass --overwrite_output_dir" in capsys.readouterr().err
    assert (output / "sparsity-0.5" / "model.safetensors").read_bytes() == before
    again = ["--sparsity", "0.5", "--overwrite_output_dir"]
    assert prune(tiny_checkpoint, output, *again) == 0
    assert (output / "sparsity-0.5" / "model.safetensors").read_bytes() == before
    assert prune(tiny_checkpoint, output, *again, "--method", "magnitude") == 0
    assert (output / "sparsity-0.5" / "model.safetensors").read_bytes() != before


def test_yaml_and_json_files(tiny_checkpoint, tmp_path):
    arguments = {
        "model_name_or_path": str(tiny_checkpoint),
        "output_dir": str(tmp_path / "yaml"),
        "sparsity": [0.5],
        "num_grads": 32,
        "fisher_block_size": 8,
        "damp": 1e-3,
        "include": None,
        "do_eval": False,
        "disable_tqdm": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments))
    (tmp_path / "run.json").write_text(json.dumps(arguments | {"output_dir": str(tmp_path / "json")}))
    assert main(["prune", str(tmp_path / "run.yaml")]) == 0
    assert main(["prune", str(tmp_path / "run.json")]) == 0
    files = [(tmp_path / name / "sparsity-0.5" / "model.safetensors").read_bytes() for name in ("yaml", "json")]
    assert files[0] == files[1]
    report = json.loads((tmp_path / "yaml" / "report.json").read_text())
    assert report["dense"] is None
    assert report["config"]["fisher_block_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.0"], "sparsity 1 is not in [0, 1)"),
        (["--sparsity", "-0.5"], "sparsity -0.5 is not in [0, 1)"),
        ([], "say how sparse: --sparsity 0.5 0.75 0.9"),
        (["--sparsity", "half"], "argument --sparsity: invalid float value: 'half'"),
        (["--sparsity", "0.5", "--sparsty", "0.5"], "--sparsty"),
        (["--sparsity", "0.5", "--method", "best"], "argument --method: invalid choice: 'best'"),
        (["--allocation", "2:5"], "2:5 does not divide the 16 input channels of vit.layers.0.attention.q_proj"),
        (["--allocation", "2:4", "--sparsity", "0.7"], "--allocation 2:4 is sparsity 0.5"),
        (["--allocation", "4:2"], "allocation='4:2' is not global, uniform or N:M"),
        (["--sparsity", "0.5", "--include", "*.fc7"], "--include '*.fc7' matches no target"),
        (["--sparsity", "0.5", "--dataset_name", "/nowhere"], "--dataset_name /nowhere cannot be loaded"),
        (["--sparsity", "0.5", "--image_column_name", "img"], "no column 'img'"),
        (["--sparsity", "0.5", "--eval_split_name", "val"], "no split 'val'; it has train, test"),
        (["--sparsity", "0.5", "--per_device_batch_size", "-1", "--num_grads", "0"], "num_grads=0"),
        (["--sparsity", "0.5", "--damp", "0"], "damp=0.0 must be greater than 0"),
        (["--sparsity", "0.5", "--seed", "-1"], "seed=-1 must be a whole number"),
        (["--sparsity", "0.9999999999999"], "is not in [0, 1)"),
    ],
)
def test_a_users_mistake_is_one_line(tiny_checkpoint, tmp_path, capsys, arguments, message):
    values = ["prune", "--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(tmp_path / "out"), *arguments]
    assert main(values) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("cap-hf prune: ")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sparsities_that_are_close_have_folders_of_their_own(tiny_checkpoint, tmp_path):
    close = ["--sparsity", "0.1234567", "0.12345671", "0.1234567", "0.9999999"]
    assert prune(tiny_checkpoint, tmp_path / "out", *close, "--no_do_eval", "--method", "magnitude") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.json", "sparsity-0.1234567", "sparsity-0.12345671", "sparsity-0.9999999"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity: [0.5", "cannot be read: while parsing"),
        ("- 0.5", "must hold names and values"),
        ("sparsity: half", "invalid float value: 'half'"),
        ("sparsity: 0.5\nspeed: 3", "--speed=3"),
        ("sparsity: 0.5\ndamp: high", "invalid float value: 'high'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tiny_checkpoint, tmp_path, capsys, text, message):
    model = f"model_name_or_path: {tiny_checkpoint}\n" if ":" in text else ""
    (tmp_path / "run.yaml").write_text(f"{model}{text}\n")
    assert main(["prune", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert main(["prune", str(tmp_path / "nowhere.yaml")]) == 1
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err


def test_a_bad_output_dir_is_found_first(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert prune(tiny_checkpoint, output, "--sparsity", "0.5", "--dataset_name", "/nowhere") == 1
        assert "file is a file: choose another --output_dir" in capsys.readouterr().err


def test_calibration_is_on_the_train_split_alone(tiny_checkpoint, tmp_path, capsys):
    for label in range(10):
        (tmp_path / "data" / "train" / str(label)).mkdir(parents=True)
        Image.new("L", (8, 8), label).save(tmp_path / "data" / "train" / str(label) / "0.png")
    data = ["--sparsity", "0.5", "--dataset_name", str(tmp_path / "data")]
    assert prune(tiny_checkpoint, tmp_path / "out", *data) == 1
    assert "no validation or test split" in capsys.readouterr().err
    assert prune(tiny_checkpoint, tmp_path / "out", *data, "--no_do_eval") == 0
    (tmp_path / "data" / "train").rename(tmp_path / "data" / "test")
    arguments = ["--model_name_or_path", str(tiny_checkpoint), "--dataset_name", str(tmp_path / "data")]
    assert main(["evaluate", *arguments, "--output_dir", str(tmp_path / "eval")]) == 0
    assert prune(tiny_checkpoint, tmp_path / "other", *data, "--no_do_eval") == 1
    assert "no split 'train'; it has test" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_one_line(tiny_checkpoint, tmp_path, capsys):
    assert prune(tmp_path / "nowhere", tmp_path / "out", "--sparsity", "0.5") == 1
    assert "nowhere cannot be loaded: " in capsys.readouterr().err
    # A backbone has no classifier: it must not come up with a random one.
    backbone = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    backbone.save_pretrained(tmp_path / "backbone")
    assert prune(tmp_path / "backbone", tmp_path / "out", "--sparsity", "0.5") == 1
    assert "has no weights for classifier" in capsys.readouterr().err.splitlines()[-1]
    (tiny_checkpoint / "preprocessor_config.json").unlink()
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5") == 1
    assert "has no image processor: " in capsys.readouterr().err
    (tiny_checkpoint / "model.safetensors").write_bytes(b"\0" * 100)
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5") == 1
    assert "cannot be loaded: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pickled_checkpoint_is_refused(tiny_checkpoint, tmp_path, capsys):
    weights = load_file(tiny_checkpoint / "model.safetensors")
    (tiny_checkpoint / "model.safetensors").unlink()
    torch.save(weights, tiny_checkpoint / "pytorch_model.bin")
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.5") == 1
    assert "safetensors" in capsys.readouterr().err


def test_labels_of_another_dataset_are_one_line(tiny_checkpoint, tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "data" / split / name / "0.png")
    data = ["--sparsity", "0.5", "--dataset_name", str(tmp_path / "data")]
    assert prune(tiny_checkpoint, tmp_path / "out", *data) == 1
    assert "'label' has 2 classes (cat, dog), the model has 10: LABEL_0" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_one_line(tiny_checkpoint, tmp_path, capsys, workers):
    for split in ("train", "test"):
        for label in range(10):
            (tmp_path / "data" / split / str(label)).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "data" / split / str(label) / "0.png")
    (tmp_path / "data" / "test" / "7" / "0.png").write_bytes(b"GIF89a")
    data = ["--sparsity", "0.5", "--dataset_name", str(tmp_path / "data"), "--dataloader_num_workers", workers]
    assert prune(tiny_checkpoint, tmp_path / "out", *data) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("cap-hf prune: image 7 (")
    assert "0.png) cannot be read" in error


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert main([]) == 2
    assert main(["shrink"]) == 2
    assert "there is no command 'shrink'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["prune", "--help"])
    assert caught.value.code == 0
    assert "--fisher_block_size" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing_half_written(tiny_checkpoint, tmp_path):
    output = tmp_path / "out"
    # Thousands of batches of one example: there is plenty of time to interrupt them.
    arguments = ["--num_grads", "100000", "--per_device_batch_size", "1", "--sparsity", "0.5"]
    arguments += ["--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(output), "--no_do_eval"]
    command = [sys.executable, "-m", "cap_hf.commands.main", "prune", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "Collecting" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "interrupted" in rest
    assert not output.exists()


def test_demo_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "METHODS", {"CAP": "cap", "magnitude, global": "magnitude"})
    arguments = ["demo", "--output_dir", str(tmp_path), "--num_train_epochs", "1", "--num_grads", "32"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "predict the same" in first
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "sparsity-0.9")
    zeros = sum(int((value == 0).sum()) for name, value in loaded.state_dict().items() if ".layers." in name)
    assert zeros > 0.85 * sum(v.numel() for n, v in loaded.state_dict().items() if ".layers." in n and v.dim() == 2)
    assert main(arguments) == 0
    second = capsys.readouterr().out
    assert "Using the dense model" in second
    # The same dense model, the same seed: the same table.
    assert second.split("top-1 %")[1] == first.split("top-1 %")[1]
