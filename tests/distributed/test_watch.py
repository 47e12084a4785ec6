"""Every process of a run ends with one line when one of them does, and leaves no temporary folder."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from support.launching import ENVIRONMENT, dense_checkpoint, launch, launch_machines

import cap_hf.distributed.watch as watch_module
from cap_hf.distributed.watch import Watch, lost_peer

# `cap-hf prune` with trouble in process 1: while gradients are sent, or while process 0 is at work on its own.
TROUBLE = """
import os, signal, time
from pathlib import Path
import torch.distributed as dist
import cap_hf.distributed.heartbeat as heartbeat
from cap_hf.commands.launch import launch
from cap_hf.compressor import CAPCompressor
from cap_hf.distributed.processes import Processes
from cap_hf.distributed.temporary import TemporaryFolder

heartbeat.INTERVAL = float(os.environ.get("INTERVAL", heartbeat.INTERVAL))
trouble, rank = os.environ["TROUBLE"], int(os.environ["RANK"])
folder = TemporaryFolder(os.environ["SPILL"])
(Path(folder.name) / f"of-{rank}").write_text("sums")
kind, name, count = (CAPCompressor, "prune_each", 1) if "alone" in trouble else (Processes, "meet", 20)
method = getattr(kind, name)
calls = 0

def wrapped(*args):
    global calls
    calls += 1
    if calls == count:
        if rank == 1 and "killed" in trouble:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            raise dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error 'out of memory'")
        if "alone" in trouble:
            time.sleep(100)
    return method(*args)

setattr(kind, name, wrapped)
launch("prune")
"""


def prepare(tmp_path: Path) -> tuple[Path, list[str], Path]:
    """The script, its arguments and the folder for temporary folders."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    (tmp_path / "spill").mkdir()
    arguments = ["--model_name_or_path", str(dense_checkpoint(tmp_path / "dense")), "--sparsity", "0.5"]
    arguments += ["--num_grads", "64", "--per_device_batch_size", "8", "--no_do_eval"]
    return tmp_path / "trouble.py", [*arguments, "--output_dir", str(tmp_path / "out")], tmp_path / "spill"


@pytest.mark.parametrize("trouble", ["killed", "killed while the other is alone", "NCCL"])
def test_trouble_of_one_process_ends_the_others_with_one_line(tmp_path, trouble):
    script, arguments, spill = prepare(tmp_path)
    done = launch(2, *arguments, expect=1, script=script, TROUBLE=trouble, SPILL=str(spill))
    # The launcher has a traceback of its own; process 0 has a line, and process 1 if it lived to say something.
    lines = [line for line in done.stderr.splitlines() if "cap-hf prune:" in line]
    own = [line for line in lines if "another process" not in line]
    assert len(lines) - len(own) == 1
    assert len(own) == (trouble == "NCCL")
    assert not (tmp_path / "out").exists()
    left = [file.name for file in spill.glob("*/*")]
    if trouble == "NCCL":
        # What process 1 knows is not lost.
        assert "unhandled cuda error 'out of memory'" in own[0]
        assert left == []
    else:
        assert left == ["of-1"]


def test_a_process_killed_on_another_machine_ends_this_one(tmp_path):
    script, arguments, spill = prepare(tmp_path)
    trouble = {"TROUBLE": "killed while the other is alone", "INTERVAL": "1", "SPILL": str(spill)}
    machines = launch_machines(script, *arguments, ACCELERATE_USE_CPU="true", **trouble)
    try:
        errors = [machine.communicate(timeout=120)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert all(machine.returncode for machine in machines)
    assert "cap-hf prune: process 1 gives no sign of life" in errors[0]
    assert [file.name for file in spill.glob("*/*")] == ["of-1"]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:48872"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network"), True),
        (dist.DistBackendError("store->get('0') got error: wait timeout after 600000ms, keys: /0"), True),
        (dist.DistNetworkError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error"), False),
        (dist.DistBackendError("NCCL error, invalid usage. Duplicate GPU detected : rank 1 and rank 0"), False),
        (RuntimeError("CUDA out of memory while NCCL was connecting"), False),
        (RuntimeError("[enforce fail at gloo/types.h] Tensors must be contiguous"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (ValueError("nccl"), False),
    ],
)
def test_a_lost_peer_is_told_from_trouble_of_its_own(error, lost):
    assert lost_peer(error) is lost


ENDING = """
import os, sys, threading, time
from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.distributed.watch import end

folder = TemporaryFolder(sys.argv[1])

def write():
    for number in range(10**9):
        with open(os.path.join(folder.name, str(number % 1000)), "wb") as file:
            file.write(bytes(10**5))

for _ in range(2):
    threading.Thread(target=write, daemon=True).start()
time.sleep(0.2)
for line in ("first", "second"):
    threading.Thread(target=end, args=(3, line)).start()
time.sleep(60)
"""


def test_two_threads_end_a_process_once_and_remove_what_others_write_to(tmp_path):
    command = [sys.executable, "-c", ENDING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 3
    assert [line for line in done.stderr.splitlines() if line in ("first", "second")] == ["first"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ends(monkeypatch):
    """What `end` is called with, in place of an end; the run of one process that it would end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    calls = []
    monkeypatch.setattr(watch_module, "end", lambda *args: calls.append(args))
    yield calls
    del store


def test_a_signal_to_a_child_is_none_to_its_parent(ends):
    with Watch("prune"):
        fork = multiprocessing.get_context("fork")
        ready = fork.Event()
        child = fork.Process(target=lambda: (ready.set(), time.sleep(100)))
        child.start()
        assert ready.wait(20)
        child.terminate()
        child.join(20)
        time.sleep(0.3)
    child.kill()
    assert child.exitcode == -signal.SIGTERM
    assert ends == []


def test_a_signal_ends_a_process_that_waits(ends):
    with Watch("prune"):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not ends and time.monotonic() < deadline:
            time.sleep(0.05)
    ((code, line),) = ends
    assert code == 1
    assert line.startswith("cap-hf prune: told to end")
