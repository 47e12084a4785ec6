"""`accelerate launch` with 1, 2 and 4 processes on CPU, and on two machines: the masks of one plain process."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.models import build
from transformers import ViTImageProcessorPil

from cap_hf.commands.main import main
from cap_hf.distributed.watch import MISSED, Heartbeat

ROOT = Path(__file__).parents[2]


ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(
    processes: int, *arguments: str, expect: int = 0, script: Path = ROOT / "scripts" / "prune.py", **environment: str
) -> subprocess.CompletedProcess:
    launcher = [*LAUNCHER, "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    done = subprocess.run(
        [*launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**ENVIRONMENT, **environment},
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
        assert torch.equal(value, weights[1][name]), name
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
from support.models import build, random_batches
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


EVERYTHING = """
import sys
import torch
from accelerate import Accelerator
from support.models import ARCHITECTURES, build, random_batches
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from cap_hf import CAPCompressor, CAPConfig, plan
from cap_hf.distributed.processes import Processes
from cap_hf.method.fisher import block_shares

accelerator = Accelerator(cpu=True)
plan.CACHED_BYTES = 12000  # a batch of 4 goes through the models in parts
found, parts = {}, set()
for name, config in {
    "ViT": {}, "ResNet": {}, "ConvNext": {"fisher_block_size": 8}, "Swin": {"allocation": "uniform"},
    "Dinov2": {"allocation": "2:4"}, "DeiT": {"method": "obs", "fisher_dtype": "bfloat16"},
}.items():
    model = build(name)
    (batch,) = random_batches(model, ARCHITECTURES[name][1], sizes=(41,))
    examples = [{key: value[i] for key, value in batch.items()} for i in range(41)]
    loader = DataLoader(examples, batch_size=4, shuffle=True)
    compressor = CAPCompressor(model, CAPConfig(num_grads=38, **config), accelerator, disable_tqdm=True)
    compressor.collect(loader).prune(None if "allocation" in config and ":" in config["allocation"] else 0.7)
    parts.add(compressor.plan.at_a_time)
    for target in compressor.targets:
        found[f"{name} {target.name}"] = target.weight.detach().contiguous()
        own = compressor.fisher.sums[target.name].full()
        everyone = Processes(accelerator)
        found[f"{name} {target.name} sums"] = everyone.assemble(own, block_shares(target, everyone)).contiguous()
assert parts & {2, 3}, parts
if accelerator.is_main_process:
    save_file(found, sys.argv[1])
accelerator.wait_for_everyone()
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The script, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    script = folder / "everything.py"
    script.write_text(EVERYTHING)
    launch(1, str(folder / "1.safetensors"), script=script)
    return script, load_file(folder / "1.safetensors")


def assert_same(expected, found):
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_four_processes_give_the_sums_and_weights_of_one(alone, tmp_path):
    script, expected = alone
    launch(4, str(tmp_path / "found.safetensors"), script=script)
    assert_same(expected, load_file(tmp_path / "found.safetensors"))


LONELY = """
from accelerate import Accelerator
from support.models import build
from cap_hf import CAPCompressor

CAPCompressor(build("ViT"), accelerator=Accelerator())
"""


def test_processes_that_believe_to_be_alone_are_an_error(tmp_path):
    (tmp_path / "lonely.py").write_text(LONELY)
    done = launch(2, script=tmp_path / "lonely.py", expect=1)
    assert "2 processes were launched and each believes to be alone: without GPUs set ACCELERATE_USE_CPU" in done.stderr


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def launch_machines(script: Path, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Two launchers, as on two machines, of one process each."""
    port = str(free_port())
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    return [
        subprocess.Popen(
            [*LAUNCHER, *options, "--main_process_port", port, "--machine_rank", str(rank), str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **environment},
        )
        for rank in range(2)
    ]


def test_two_machines(alone, tmp_path):
    script, expected = alone
    machines = launch_machines(script, str(tmp_path / "found.safetensors"), ACCELERATE_USE_CPU="true")
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert_same(expected, load_file(tmp_path / "found.safetensors"))


# `cap-hf prune` whose process 1 is killed: while gradients are collected, or while process 0 is at work on its own.
DYING = """
import os, signal, sys, time
import cap_hf.distributed.watch as watch
from cap_hf.commands.main import launch
from cap_hf.method.fisher import BlockFisher
from cap_hf.collection.solver import Solver

watch.INTERVAL = float(os.environ.get("INTERVAL", watch.INTERVAL))
moment, rank = os.environ["MOMENT"], int(os.environ["RANK"])
kind, name, count = {"collect": (BlockFisher, "add", 20), "solve": (Solver, "eliminate", 2)}[moment]
method = getattr(kind, name)
calls = 0

def wrapped(*args):
    global calls
    calls += 1
    if calls == count:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "solve":
            time.sleep(100)
    return method(*args)

setattr(kind, name, wrapped)
launch("prune")
"""


@pytest.mark.parametrize("moment", ["collect", "solve"])
def test_a_killed_process_ends_the_others_with_one_line(checkpoint, tmp_path, moment):
    (tmp_path / "dying.py").write_text(DYING)
    arguments = ["--model_name_or_path", str(checkpoint), "--sparsity", "0.5", "--num_grads", "64", "--no_do_eval"]
    arguments += ["--per_device_batch_size", "8", "--output_dir", str(tmp_path / "out")]
    start = time.monotonic()
    done = launch(2, *arguments, expect=1, script=tmp_path / "dying.py", MOMENT=moment)
    assert time.monotonic() - start < 60
    # The launcher has a traceback of its own; this process has a line.
    lines = [line for line in done.stderr.splitlines() if "cap-hf prune:" in line]
    assert len(lines) == 1
    assert "another process" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_process_killed_on_another_machine_ends_this_one(checkpoint, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    arguments = ["--model_name_or_path", str(checkpoint), "--sparsity", "0.5", "--num_grads", "64", "--no_do_eval"]
    arguments += ["--per_device_batch_size", "8", "--output_dir", str(tmp_path / "out")]
    start = time.monotonic()
    machines = launch_machines(
        tmp_path / "dying.py", *arguments, MOMENT="solve", INTERVAL="1", ACCELERATE_USE_CPU="true"
    )
    try:
        errors = [machine.communicate(timeout=120)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert time.monotonic() - start < 60
    assert all(machine.returncode for machine in machines)
    assert "cap-hf prune: process 1 has given no sign of life for 10 seconds" in errors[0]


def test_silence_is_noticed_and_an_end_is_not_silence():
    store = dist.HashStore()
    first, second = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    for _ in range(5):
        assert first.beat() is None
        assert second.beat() is None
    assert [first.beat() for _ in range(MISSED + 1)][-2:] == [None, 1] or first.beat() == 1
    assert second.beat() is None
    second.done()
    assert [first.beat() for _ in range(2 * MISSED)] == [None] * 2 * MISSED


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
