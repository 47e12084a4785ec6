"""`cap-hf evaluate`: what it measures is what `cap-hf prune` reported."""

import json

from support.commands import DIGITS, image_folder, prune

from cap_hf.commands.main import main


def test_the_metrics_are_those_of_the_report(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.75") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    folder, evaluated = tmp_path / "out" / "sparsity-0.75", tmp_path / "eval"
    capsys.readouterr()
    arguments = ["--model_name_or_path", str(folder), "--output_dir", str(evaluated), "--max_eval_samples", "50"]
    assert main(["evaluate", *arguments]) == 0
    results = json.loads((evaluated / "eval_results.json").read_text())
    assert results["metrics"] == report["results"][0]["sparse"]
    assert "on 50 examples" in capsys.readouterr().out


def test_no_train_split_is_needed(tiny_checkpoint, tmp_path):
    data = image_folder(tmp_path / "data", ("test",), DIGITS)
    arguments = ["--model_name_or_path", str(tiny_checkpoint), "--dataset_name", str(data)]
    assert main(["evaluate", *arguments, "--output_dir", str(tmp_path / "eval")]) == 0
    assert json.loads((tmp_path / "eval" / "eval_results.json").read_text())["metrics"]["num_examples"] == 10


def test_images_without_labels_are_one_line(tiny_checkpoint, tmp_path, capsys):
    data = image_folder(tmp_path / "data", ("train", "test"), ("",))
    arguments = ["--model_name_or_path", str(tiny_checkpoint), "--dataset_name", str(data)]
    assert main(["evaluate", *arguments, "--output_dir", str(tmp_path / "eval")]) == 1
    expected = "cap-hf evaluate: there is no column of labels among image: name one with --label_column_name"
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith(expected) for line in said) == 1
    assert not (tmp_path / "eval").exists()
