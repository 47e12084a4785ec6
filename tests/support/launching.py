"""Runs scripts as several processes, on one machine or as on two.

`launch` forks them, which takes no time; `launch_with_accelerate` is the way of a user, and takes ten seconds more.
"""

import os
import subprocess
import sys
from pathlib import Path

from transformers import ViTImageProcessorPil

from support.models import build
from support.warm import ROOT, free_port, run_forked

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(
    processes: int, *arguments: str, expect: int = 0, script: Path = ROOT / "scripts" / "prune.py", **environment: str
) -> subprocess.CompletedProcess:
    """Run a script as several processes on CPUs; `expect` is 0 where it has to succeed, 1 where it has to fail."""
    several = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    done = run_forked(script, arguments, {**ENVIRONMENT, **several, **environment}, processes)
    assert (done.returncode == 0) == (expect == 0), done.stderr
    return done


def launch_with_accelerate(
    processes: int, *arguments: str, expect: int = 0, script: Path = ROOT / "scripts" / "prune.py", **environment: str
) -> subprocess.CompletedProcess:
    """Do the same with `accelerate launch` and new processes."""
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


def launch_machines(script: Path, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Start two launchers, as on two machines, of one process each."""
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


def dense_checkpoint(folder: Path) -> Path:
    """Save a ViT for the digits, whose gradients are large enough to compare, and its image processor."""
    build("ViT", num_channels=1).save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    ).save_pretrained(folder)
    return folder
