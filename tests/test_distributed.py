"""`accelerate launch` with 1 and 2 processes on CPU: the same masks and weights as one plain process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from cap_hf.commands.main import main

ROOT = Path(__file__).parents[1]


def launch(
    processes: int, *arguments: str, expect: int = 0, script: Path = ROOT / "scripts" / "prune.py"
) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    done = subprocess.run(
        [*launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode == 0) == (expect == 0), done.stderr
    return done


@pytest.fixture
def checkpoint(tmp_path):
    """A ViT for the digits whose gradients are large enough to compare."""
    build("ViT", num_channels=1).save_pretrained(tmp_path / "dense")
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    ).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("extra", [[], ["--fisher_type", "sampled", "--samples_per_grad", "2"]])
def test_two_processes_give_the_result_of_one(checkpoint, tmp_path, extra):
    # 90 gradient samples in batches of 16: neither the batches nor the shares come out even.
    common = ["--model_name_or_path", str(checkpoint), "--sparsity", "0.75", "--num_grads", "90", "--disable_tqdm"]
    common += [
        "--per_device_batch_size",
        "16",
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
            done = launch(processes, *common, "--output_dir", str(output))
            assert done.stdout.count("sparsity-0.75") == 1
        reports.append(json.loads((output / "report.json").read_text()))
        weights.append(load_file(output / "sparsity-0.75" / "model.safetensors"))
    assert [report["num_processes"] for report in reports] == [1, 2]
    for name, value in weights[0].items():
        assert torch.equal(value == 0, weights[1][name] == 0), name
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)
    first, second = (report["results"][0]["sparse"] for report in reports)
    assert second["num_examples"] == first["num_examples"] == 75
    assert second["top1"] == pytest.approx(first["top1"])
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert reports[0]["dense"]["loss"] == pytest.approx(reports[1]["dense"]["loss"], rel=1e-6)


SHUFFLED = """
import sys
import torch
from torch.utils.data import DataLoader
from accelerate import Accelerator
from conftest import build, random_batches
from cap_hf import CAPCompressor, CAPConfig

accelerator = Accelerator(cpu=True)
torch.manual_seed(accelerator.process_index)  # processes that would each shuffle in their own way
model = build("ViT")
(batch,) = random_batches(model, 8, sizes=(50,))
examples = [{name: value[i] for name, value in batch.items()} for i in range(50)]
loader = DataLoader(examples, batch_size=16, shuffle=True)
fisher = CAPCompressor(model, CAPConfig(num_grads=50), accelerator).collect(loader).fisher
own = [batch] if accelerator.is_main_process else []
whole = CAPCompressor(model, CAPConfig(num_grads=50), accelerator).collect(own)
assert any(len(sums) for sums in fisher.sums.values())
assert fisher.count == whole.fisher.count == 50
for name, sums in fisher.sums.items():
    torch.testing.assert_close(sums.full(), whole.fisher.sums[name].full(), rtol=1e-3, atol=1e-6)
accelerator.end_training()
"""


def test_a_shuffling_dataloader_is_shared_without_overlap(tmp_path):
    (tmp_path / "shuffled.py").write_text(SHUFFLED)
    launch(2, script=tmp_path / "shuffled.py")


def test_one_launched_process_works(checkpoint, tmp_path):
    arguments = ["--model_name_or_path", str(checkpoint), "--sparsity", "0.5", "--num_grads", "16", "--no_do_eval"]
    launch(1, *arguments, "--output_dir", str(tmp_path / "out"))
    assert (tmp_path / "out" / "sparsity-0.5" / "model.safetensors").exists()


def test_a_mistake_ends_all_processes(checkpoint, tmp_path):
    done = launch(
        2, "--model_name_or_path", str(checkpoint), "--sparsity", "2", "--output_dir", str(tmp_path / "out"), expect=1
    )
    assert "sparsity 2 is not in [0, 1)" in done.stderr
    assert not (tmp_path / "out").exists()
