"""The process group of a command waits longer than any work between two collectives."""

import subprocess
import sys

from support.launching import ENVIRONMENT, free_port

CONNECTED = """
import torch
import torch.distributed as dist
from cap_hf.distributed.accelerator import TIMEOUT, make_accelerator

accelerator = make_accelerator()
assert dist.is_initialized()
backend = dist.distributed_c10d._get_default_group()._get_backend(accelerator.device)
assert backend.options._timeout == TIMEOUT, backend.options._timeout
accelerator.end_training()
"""


def test_a_collective_may_take_as_long_as_an_elimination():
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECTED],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**ENVIRONMENT, **address, **place},
    )
    assert done.returncode == 0, done.stderr
