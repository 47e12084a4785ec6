"""A command as one of the processes that `accelerate launch` starts; scripts/ are the launchers' entry points."""

import os
import sys

import torch

from cap_hf.commands.main import attempt, main, message
from cap_hf.distributed.watch import Watch, end, lost_peer
from cap_hf.errors import reason


def launch(command: str) -> None:
    """Run a command, alone or as one of several processes, and exit with its code."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.accelerator.is_available():
        # Without this accelerate sees no devices to share out, and connects no processes.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if world == 1 and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        advice = "accelerate started one process only: for several on CPUs add --multi_gpu to its arguments"
        print(f"cap-hf {command}: {advice}", file=sys.stderr)
    sys.exit(run_among_others(command) if world > 1 else main([command, *sys.argv[1:]]))


def run_among_others(command: str) -> int:
    """Run a command as one of several processes: with one line, never a hang, when another one is gone.

    Returns:
        0. A process that fails ends here, since another one may wait for it in a collective: the launcher then ends
        the others.
    """
    with Watch(command):
        code, line = attempt(command, sys.argv[1:], explain)
        if code:
            # Now, before the launcher's signal makes a second line of it.
            sys.stdout.flush()
            end(code, line)
    return code


def explain(error: Exception) -> str:
    """Return one line about an error: that another process is gone, where that is what it means."""
    if lost_peer(error):
        gone = "another process of this run has ended or cannot be reached: see what it said"
        return f"{gone} (here: {reason(error)})"
    return message(error)
