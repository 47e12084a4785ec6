"""What was streamed is kept once for all processes, whole or not at all."""

import json
import os
import signal
import subprocess
import time

import datasets
import pytest
from safetensors.torch import load_file
from support.checkpoints import PYTHON, clean_environment
from support.dataset_hub import DatasetHub
from support.image_files import write_parquet
from support.launching import dense_checkpoint, launch

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


def test_one_and_two_processes_prune_alike_on_streamed_examples(tmp_path):
    """Two processes share one cache or have one each: the examples are the same, and with them the pruned weights."""
    model = dense_checkpoint(tmp_path / "model")
    with DatasetHub() as hub:
        hub.datasets["user/name"] = write_parquet(tmp_path / "d", shards=4, count=400, classes=10, old=True)
        write_parquet(tmp_path / "d", shards=1, count=100, classes=10, old=True, split="test")
        pruned, sent = {}, {}
        for processes in (1, 2):
            hub.sent = 0
            output = tmp_path / f"out-{processes}"
            arguments = ["--model_name_or_path", str(model), "--dataset_name", "user/name", "--sparsity", "0.5"]
            arguments += ["--num_grads", "32", "--max_eval_samples", "20", "--output_dir", str(output)]
            environment = {
                "HF_HOME": str(tmp_path / f"home-{processes}"),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_OFFLINE": "0",
            }
            launch(processes, *arguments, "--disable_tqdm", HF_HUB_DISABLE_XET="1", **environment)
            report = json.loads((output / "report.json").read_text())
            assert report["num_processes"] == processes
            assert report["dense"]["num_examples"] == 20
            pruned[processes] = load_file(output / "sparsity-0.5" / "model.safetensors")
            sent[processes] = hub.sent
    # The second process has not fetched anything that the first one had.
    assert sent[2] < 1.2 * sent[1]
    for name, weight in pruned[1].items():
        assert (weight == 0).equal(pruned[2][name] == 0), name
