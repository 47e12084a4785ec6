"""Processes that are there at once: forks of one Python that has imported what takes its seconds.

A new Python takes about six seconds until torch, transformers and cap_hf are there. So there is one that waits with
them, single-threaded, beside each process of the tests, and every script that is run is a fork of it, with its own
arguments, environment and output. What is said of the start itself - imports, `accelerate launch` - is tested with new
ones.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# What a script may need; nothing of it computes, or starts a thread, while it is imported.
IMPORTED = (
    "support.torchvision_operators",
    "support.models",
    "support.recovery",
    "support.finetuning",
    "sklearn.datasets",
    "cap_hf.commands.launch",
    "cap_hf.commands.prune",
    "cap_hf.commands.preparing",
    "cap_hf.commands.pruning",
    "cap_hf.commands.recording",
    "cap_hf.commands.searching",
    "cap_hf.commands.dry_run",
    "cap_hf.commands.healing",
    "cap_hf.commands.finetune",
    "transformers.models.vit.image_processing_pil_vit",
)
# How often it looks whether one has ended, and how long the others then get to end too; as torchrun does.
LOOK, GRACE = 0.1, 30.0


def run_forked(
    script: Path, arguments: Sequence[str], environment: Mapping[str, str], processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run a script as a fork, or as several whose output is one; return what came of it.

    Args:
        script: that is run as `__main__`.
        arguments: of the script.
        environment: the whole of it, but RANK and the like, which several processes get beside it.
        processes: how many; where one of several fails, the others are told to end.
        timeout: seconds until all are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        asked = {"script": str(script), "arguments": list(arguments), "environment": dict(environment)}
        asked |= {"processes": processes, "timeout": timeout, "files": files, "folder": os.getcwd()}
        waiting = _waiting()
        waiting.stdin.write(json.dumps(asked) + "\n")
        waiting.stdin.flush()
        answer = waiting.stdout.readline()
        assert answer, "the process that forks has ended"
        codes = json.loads(answer)
        said = [Path(file).read_text(errors="replace") for file in files]
    code = codes[0] if processes == 1 else int(any(codes))
    return subprocess.CompletedProcess([str(script), *arguments], code, *said)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


_STARTED: dict[int, subprocess.Popen] = {}


def _waiting() -> subprocess.Popen:
    """Return the process that forks, which is started when it is first needed."""
    own = os.getpid()
    if own not in _STARTED:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        started = subprocess.Popen(
            [sys.executable, "-m", "support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        _STARTED[own] = started
        # It ends with its standard input.
        atexit.register(started.stdin.close)
    return _STARTED[own]


def serve() -> None:
    """Fork for each line of standard input, and answer with the exit codes."""
    answers = os.fdopen(os.dup(1), "w")
    # What is said while modules are imported is no answer.
    os.dup2(2, 1)
    for name in IMPORTED:
        importlib.import_module(name)
    names = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    # What pyarrow allocates with starts its own thread again in a fork; any other would be missing there.
    threads = [name for name in names if name != "jemalloc_bg_thd"]
    assert len(threads) == 1, threads
    while line := sys.stdin.readline():
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _run(asked: dict[str, Any]) -> list[int]:
    connected: list[dict[str, str]] = [{}]
    if asked["processes"] > 1:
        world, port = str(asked["processes"]), str(free_port())
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = range(asked["processes"])
        connected = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks]
    children = [_fork(asked, each) for each in connected]
    codes: dict[int, int] = {}
    deadline, told = time.monotonic() + asked["timeout"], False
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        left = set(children) - set(codes)
        if left and any(codes.values()) and not told:
            told, deadline = True, min(deadline, time.monotonic() + GRACE)
            for child in left:
                os.kill(child, signal.SIGTERM)
        for child in left if time.monotonic() > deadline else ():
            os.kill(child, signal.SIGKILL)
        if left:
            time.sleep(LOOK)
    return [codes[child] for child in children]


def _fork(asked: dict[str, Any], connected: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for descriptor, file in zip((1, 2), asked["files"], strict=True):
            # Several processes write into one file, and none over what another one has written.
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update({**asked["environment"], **connected})
        os.chdir(asked["folder"])
        sys.argv = [asked["script"], *asked["arguments"]]
        sys.path[0] = str(Path(asked["script"]).parent)
        runpy.run_path(asked["script"], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _finish(code)
    raise AssertionError("a fork goes no further than its script")


def _finish(code: int) -> None:
    """End a fork as Python ends: handlers of `atexit`, what is still to be written, the code."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
