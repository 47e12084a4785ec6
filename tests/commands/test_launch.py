"""`scripts/prune.py` under `accelerate launch`: one process and two, mistakes, and commands that are told to end."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from support.backbones import backbone_checkpoint
from support.launching import dense_checkpoint, launch, launch_with_accelerate

import cap_hf.commands.evaluate as evaluate
from cap_hf.commands.main import main
from cap_hf.distributed.temporary import TemporaryFolder


@pytest.fixture
def checkpoint(tmp_path) -> str:
    return str(dense_checkpoint(tmp_path / "dense"))


@pytest.mark.parametrize(
    ("start", "extra"),
    [
        (launch_with_accelerate, ["--checkpoint_every", "32"]),
        (launch, ["--fisher_loss", "sampled", "--samples_per_grad", "2"]),
        (launch, ["--fisher_loss", "features", "--feature_projections", "2"]),
    ],
)
def test_two_processes_give_the_result_of_one(checkpoint, tmp_path, start, extra):
    # 90 gradient samples in batches of 16: neither the batches nor the shares come out even.
    common = [
        "--model_name_or_path",
        checkpoint,
        "--sparsity",
        "0.75",
        "--num_grads",
        "90",
        "--disable_tqdm",
    ]
    # A refit adds up the examples in the order of the processes: its last bits depend on their number.
    common += ["--refit", "false"]
    common += [
        "--max_eval_samples",
        "75",
        "--per_device_eval_batch_size",
        "16",
        *extra,
    ]
    reports, weights = [], []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        if processes == 1:
            assert main(["prune", *common, "--output_dir", str(output)]) == 0
        else:
            done = start(processes, *common, "--output_dir", str(output))
            assert done.stdout.count("sparsity-0.75") == 1
        reports.append(json.loads((output / "report.json").read_text()))
        weights.append(load_file(output / "sparsity-0.75" / "model.safetensors"))
    assert [report["num_processes"] for report in reports] == [1, 2]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    first, second = (report["results"][0]["sparse"] for report in reports)
    assert second["num_examples"] == first["num_examples"] == 75
    # Standard errors too: images are compared with themselves, whichever process saw them.
    assert second == pytest.approx(first, rel=1e-4)
    assert second["loss_drop_se"] > 0
    assert reports[0]["dense"]["loss"] == pytest.approx(reports[1]["dense"]["loss"], rel=1e-6)


def test_two_processes_measure_the_features_that_one_does(tmp_path):
    """75 and 90 images in batches of 16: the processes get images twice, which must not count."""
    dense = str(backbone_checkpoint(tmp_path / "dense"))
    common = ["--model_name_or_path", dense, "--sparsity", "0.75", "--method", "magnitude", "--disable_tqdm"]
    common += ["--max_eval_samples", "75", "--per_device_eval_batch_size", "16", "--knn_bank_size", "90"]
    assert main(["prune", *common, "--output_dir", str(tmp_path / "1")]) == 0
    launch(2, *common, "--output_dir", str(tmp_path / "2"))
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("1", "2"))
    assert second["num_processes"] == 2
    for one, two in (
        (first["dense"], second["dense"]),
        (first["results"][0]["sparse"], second["results"][0]["sparse"]),
    ):
        assert (two["num_examples"], two["bank_examples"]) == (75, 90)
        assert two == pytest.approx(one, rel=1e-4)


def test_one_launched_process_works(checkpoint, tmp_path):
    arguments = [
        "--model_name_or_path",
        checkpoint,
        "--sparsity",
        "0.5",
        "--num_grads",
        "16",
        "--no_do_eval",
    ]
    launch_with_accelerate(1, *arguments, "--output_dir", str(tmp_path / "out"))
    assert (tmp_path / "out" / "sparsity-0.5" / "model.safetensors").exists()


def test_a_mistake_ends_all_processes(checkpoint, tmp_path):
    done = launch_with_accelerate(
        2,
        "--model_name_or_path",
        checkpoint,
        "--sparsity",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
        expect=1,
    )
    assert "sparsity 2 is not in [0, 1)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_command_that_is_told_to_end_leaves_no_temporary_folder(tmp_path, monkeypatch, capsys):
    def work(argv):
        folder = TemporaryFolder(tmp_path)
        assert list(tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        folder.cleanup()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(evaluate, "main", work)
    assert main(["evaluate"]) == 130
    assert capsys.readouterr().err.startswith("cap-hf evaluate: interrupted")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
