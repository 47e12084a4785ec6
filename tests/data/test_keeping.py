"""What was streamed is kept once for all processes, whole or not at all."""

import json
import os
import signal
import subprocess
import time

import datasets
import pytest
from support.checkpoints import PYTHON, clean_environment
from support.dataset_hub import DatasetHub
from support.image_files import write_parquet
from support.launching import launch_with_accelerate

from cap_hf.data.arguments import DataArguments
from cap_hf.data.keeping import kept_split
from cap_hf.data.streaming import Streamer
from cap_hf.errors import CAPError


@pytest.fixture
def streamer(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_parquet(tmp_path / "d", shards=2, count=40, classes=2)
    return Streamer(datasets.load_dataset_builder(str(folder)))


def files(tmp_path):
    return sorted(path.suffix for path in (tmp_path / "cache" / "cap_hf").iterdir())


def test_the_second_time_nothing_is_streamed(streamer, tmp_path, monkeypatch):
    first = kept_split(streamer, "train", 10, DataArguments(), 1)
    assert files(tmp_path) == [".arrow", ".lock"]
    monkeypatch.setattr(Streamer, "read", lambda *_: pytest.fail("streamed again"))
    again = kept_split(streamer, "train", 10, DataArguments(), 1)
    assert first["label"][:] == again["label"][:]
    assert len(again) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 11},
        {"seed": 2},
        {"args": DataArguments(shuffle_buffer_size=5)},
        {"args": DataArguments(label_column_name="embedding")},
        {"share": 0.5},
        {"share": 0.5, "held_out": True},
    ],
)
def test_what_is_asked_for_otherwise_is_another_file(changes, streamer, tmp_path):
    usual = {"count": 10, "args": DataArguments(), "seed": 1}
    kept_split(streamer, "train", **usual)
    kept_split(streamer, "train", **(usual | changes))
    assert files(tmp_path).count(".arrow") == 2


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_on_the_way_leaves_nothing(error, streamer, tmp_path, monkeypatch):
    read = Streamer.read

    def broken(self, *args):
        examples = read(self, *args)
        yield next(examples)
        raise error

    monkeypatch.setattr(Streamer, "read", broken)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CAPError
    with pytest.raises(expected, match="cannot be streamed: disk full" if expected is CAPError else None):
        kept_split(streamer, "train", 10, DataArguments(), 1)
    assert files(tmp_path) == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(kept_split(streamer, "train", 10, DataArguments(), 1)) == 10


HOLD = """
import sys, time
from cap_hf.data.streaming import Streamer
from cap_hf.data.arguments import DataArguments
from cap_hf.data.splits import load_splits
read = Streamer.read
def slow(self, *args):
    for number, example in enumerate(read(self, *args)):
        yield example
        if number == 2:
            print("streaming", flush=True)
            time.sleep(600)
if sys.argv[2] == "slow":
    Streamer.read = slow
args = DataArguments(dataset_name=sys.argv[1], streaming=True, max_train_samples=10)
print(load_splits(args, needed=["train"])["train"]["label"][:])
"""


def test_who_waits_goes_on_when_the_one_that_streams_is_killed(tmp_path):
    folder = write_parquet(tmp_path / "d", shards=2, count=40, classes=2)
    environment = clean_environment(tmp_path, HF_HUB_OFFLINE="1")

    def start(how):
        command = [PYTHON, "-c", HOLD, str(folder), how]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start("slow")
    assert first.stdout.readline() == "streaming\n"
    second = start("fast")
    time.sleep(0.5)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    output, error = second.communicate(timeout=60)
    assert second.returncode == 0, error
    assert len(json.loads(output)) == 10
    assert sorted(path.suffix for path in (tmp_path / "datasets" / "cap_hf").iterdir()) == [".arrow", ".lock"]


RANK = """
import json, os, sys
from pathlib import Path
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import calibration_split
from cap_hf.data.splits import load_splits
args = DataArguments(dataset_name="user/name", max_eval_samples=20)
splits = load_splits(args, seed=1, train_examples=64)
found = {"calibration": calibration_split(splits["train"], 64, 1)["label"][:], "eval": splits["eval"]["label"][:]}
Path(sys.argv[1], f"{accelerator.num_processes}-{accelerator.process_index}.json").write_text(json.dumps(found))
accelerator.end_training()
"""


def test_each_process_has_the_same_examples_and_one_fetches_them(tmp_path):
    """Each example has a class of its own, which tells it from the others."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    sent = {}
    with DatasetHub() as hub:
        folder = write_parquet(tmp_path / "d", shards=4, count=400, classes=400, old=True)
        write_parquet(tmp_path / "d", shards=1, count=100, classes=400, old=True, split="test")
        hub.datasets["user/name"] = folder
        for processes in (1, 2):
            hub.sent = 0
            home = tmp_path / f"home-{processes}"
            environment = clean_environment(home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
            if processes == 1:
                subprocess.run([PYTHON, str(script), str(tmp_path)], env=environment, check=True, timeout=120)
            else:
                # Where a hub is, and where its files are kept, is read when huggingface_hub is imported.
                launch_with_accelerate(processes, str(tmp_path), script=script, **environment)
            sent[processes] = hub.settled()
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert alone == first == second
    assert len(set(alone["calibration"])) == 64
    assert len(set(alone["eval"])) == 20
    assert 0 < sent[2] < 1.2 * sent[1]
