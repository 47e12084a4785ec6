"""`cap-hf evaluate`: what it measures is what `cap-hf prune` reported."""

import json

import pytest
from support.backbones import backbone_checkpoint, tiny_dinov2
from support.commands import DIGITS, image_folder, prune, without_drops

from cap_hf.commands.main import main


def test_the_metrics_are_those_of_the_report(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", "--sparsity", "0.75") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    folder, evaluated = tmp_path / "out" / "sparsity-0.75", tmp_path / "eval"
    capsys.readouterr()
    arguments = ["--model_name_or_path", str(folder), "--output_dir", str(evaluated), "--max_eval_samples", "50"]
    assert main(["evaluate", *arguments]) == 0
    results = json.loads((evaluated / "eval_results.json").read_text())
    # The same but for the comparison with the dense model, which is not named here.
    there = report["results"][0]["sparse"]
    assert results["metrics"] == without_drops(there)
    assert 0 < there["loss_drop_se"] < report["dense"]["loss_se"] + there["loss_se"]
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
    expected = "cap-hf evaluate: the images have no labels: name their column with --label_column_name"
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith(expected) for line in said) == 1
    assert not (tmp_path / "eval").exists()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A backbone for the digits and a checkpoint pruned from it, in one folder with the report."""
    folder = tmp_path_factory.mktemp("backbone")
    assert prune(backbone_checkpoint(folder / "dense"), folder / "out", "--sparsity", "0.75") == 0
    return folder


def measure(output, model, *arguments):
    """Run the command; return its exit code."""
    fast = ["--max_eval_samples", "50", "--disable_tqdm", "--output_dir", str(output)]
    return main(["evaluate", "--model_name_or_path", str(model), *fast, *arguments])


def test_a_backbone_is_measured_as_its_report_says(pruned, tmp_path, capsys):
    report = json.loads((pruned / "out" / "report.json").read_text())
    folder, dense = pruned / "out" / "sparsity-0.75", pruned / "dense"
    assert measure(tmp_path, folder, "--dense_model_name_or_path", str(dense)) == 0
    results = json.loads((tmp_path / "eval_results.json").read_text())
    printed = capsys.readouterr().out
    assert "patch error" in printed
    assert "Measured on 50 examples" in printed
    # The bank is another one than beside a calibration; against the dense model nothing else has changed.
    for name in ("cosine", "cosine_p5", "patch_error"):
        assert results["metrics"][name] == pytest.approx(report["results"][0]["sparse"][name], rel=1e-5)
        assert results["dense"][name] == report["dense"][name]
    assert measure(tmp_path / "alone", folder) == 0
    alone = json.loads((tmp_path / "alone" / "eval_results.json").read_text())
    assert alone["dense"] is None
    assert alone["metrics"]["knn_top1"] == results["metrics"]["knn_top1"]
    assert "cosine" not in alone["metrics"]


def test_a_classifier_is_compared_with_its_dense_model(tiny_checkpoint, tmp_path, capsys):
    assert measure(tmp_path, tiny_checkpoint, "--dense_model_name_or_path", str(tiny_checkpoint)) == 0
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["dense"] | {f"{name}_drop_se": 0 for name in ("top1", "top5", "loss")} == results["metrics"]
    printed = capsys.readouterr().out
    assert "drop" in printed
    assert " 0.00 ± 0.00 " in printed


def test_a_backbone_that_cannot_be_measured_is_one_line(pruned, tmp_path, capsys):
    dense, unlabelled = pruned / "dense", image_folder(tmp_path / "plain", ("train", "test"), ("",))
    test_alone = image_folder(tmp_path / "test", ("test",), ("a", "b"))
    other = backbone_checkpoint(tmp_path / "other", tiny_dinov2(num_channels=1, patch_size=4))
    for arguments, message in (
        (["--knn_bank_size", "0"], "nothing to measure but k-NN and the linear probe, which --knn_bank_size 0 leaves"),
        (["--dataset_name", str(unlabelled)], "the images have no labels: name their column"),
        (["--dataset_name", str(test_alone)], "(leave them out with --knn_bank_size 0): "),
        (["--dense_model_name_or_path", "./nowhere"], "there is no folder './nowhere'"),
        (["--dense_model_name_or_path", str(other)], "compare models of one architecture"),
    ):
        capsys.readouterr()
        assert measure(tmp_path / "out", dense, *arguments) == 1
        # datasets says before what it reads.
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cap-hf")]
        assert len(said) == 1
        assert message in said[0]
    assert not (tmp_path / "out").exists()
    both = ["--dense_model_name_or_path", str(dense), "--knn_bank_size", "0", "--dataset_name", str(test_alone)]
    assert measure(tmp_path / "out", dense, *both) == 0
