"""What trackers are told, read back from what TensorBoard, trackio and wandb have kept on the disk."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import build, random_batches
from torch import nn

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.distributed.accelerator import make_accelerator
from cap_hf.tracking import PHASE, SPARSITY, Tracker, density, flat, step_of

PHASES = [{"phase": "load", "seconds": 1.5, "peak_memory_bytes": {"cpu": 1000}}]
PHASES_LATER = [*PHASES, {"phase": "collect", "seconds": 2.5, "peak_memory_bytes": {"cpu": 2000, "cuda": 3000}}]


def track(names: list[str], folder: Path) -> CAPCompressor:
    """Prune a tiny model with trackers, as the command does; return what has pruned it."""
    accelerator = make_accelerator(names, folder)
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), accelerator).collect(random_batches(model, 8))
    tracker = Tracker(accelerator, "my run", {"num_grads": 8, "include": ["a", "b"], "exclude": None, "refit": True})
    tracker.measured(0.0, {"top1": 0.9})
    for sparsity in (0.5, 0.75):
        report = compressor.prune(sparsity)
        tracker.pruned(report, compressor.targets)
        tracker.measured(sparsity, {"top1": 0.9 - sparsity / 10, "note": "no figure"})
        tracker.passed(PHASES if sparsity == 0.5 else PHASES_LATER)
    accelerator.end_training()
    return compressor


def test_tensorboard_has_figures_and_masks(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    compressor = track(["tensorboard"], tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "cap_hf"), size_guidance={"images": 0})
    events.Reload()

    def values(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(name)]

    total = compressor.report.sparsity
    assert values("sparsity") == [(500, pytest.approx(0.5, abs=1e-3)), (750, pytest.approx(total))]
    assert values("measured/top1") == [(0, pytest.approx(0.9)), (500, pytest.approx(0.85)), (750, pytest.approx(0.825))]
    assert values("seconds/load") == [(0, 1.5)]
    assert values("seconds/collect") == [(1, 2.5)]
    assert values("peak_bytes/cuda/collect") == [(1, 3000)]
    for layer in compressor.report.layers:
        assert values(f"sparsity/{layer.name}")[-1] == (750, pytest.approx(layer.sparsity))
        assert values(f"loss/{layer.name}")[-1] == (750, pytest.approx(layer.loss))
        pictures = events.Images(f"mask/{layer.name}")
        assert [(each.step, each.height, each.width) for each in pictures] == [(500, *layer.shape), (750, *layer.shape)]
    settings = next((tmp_path / "cap_hf").rglob("hparams.yml")).read_text()
    assert "num_grads: 8" in settings
    assert "include: a, b" in settings


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio: pip install 'cap_hf[trackio]'")
def test_trackio_has_figures(tmp_path):
    # In a process of its own: where trackio keeps its data is settled when it is imported.
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_tracking as own\n"
        "compressor = own.track(['trackio'], Path(sys.argv[2]))\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "assert SQLiteStorage.get_runs('cap_hf') == ['my run'], SQLiteStorage.get_runs('cap_hf')\n"
        "logs = SQLiteStorage.get_logs('cap_hf', 'my run')\n"
        "steps = [each['step'] for each in logs if 'sparsity' in each]\n"
        "assert steps == [500, 750], logs\n"
        "layer = compressor.report.layers[0]\n"
        "losses = [each[f'loss/{layer.name}'] for each in logs if f'loss/{layer.name}' in each]\n"
        "assert abs(losses[-1] - layer.loss) <= 1e-6 * layer.loss, losses\n"
        "assert [each['measured/top1'] for each in logs if 'measured/top1' in each][0] == 0.9\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    here = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(here), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def wandb_history(folder: Path) -> list[dict]:
    """The rows that wandb has kept for later: records in blocks of 32 KiB, as LevelDB has them."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, whole, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                found = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append(found)
    return rows


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: pip install 'cap_hf[wandb]'")
def test_wandb_has_figures_of_every_step_and_masks(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    compressor = track(["wandb"], tmp_path)
    rows = wandb_history(tmp_path)

    def values(name: str, axis: str = SPARSITY) -> list[tuple[int, float]]:
        return [(row[axis], row[name]) for row in rows if name in row]

    total = compressor.report.sparsity
    assert values("sparsity") == [(500, pytest.approx(0.5, abs=1e-3)), (750, pytest.approx(total))]
    assert values("measured/top1") == [(0, pytest.approx(0.9)), (500, pytest.approx(0.85)), (750, pytest.approx(0.825))]
    # Phases are numbered from 0 again, which wandb would drop as steps of its own.
    assert values("seconds/load", PHASE) == [(0, 1.5)]
    assert values("seconds/collect", PHASE) == [(1, 2.5)]
    assert values("peak_bytes/cuda/collect", PHASE) == [(1, 3000)]
    for layer in compressor.report.layers:
        assert values(f"loss/{layer.name}")[-1] == (750, pytest.approx(layer.loss))
        pictures = list(tmp_path.glob(f"wandb/offline-run-*/files/media/images/mask/{layer.name}_*.png"))
        assert len(pictures) == 2
        assert all(Image.open(picture).size == layer.shape[::-1] for picture in pictures)


def test_without_trackers_nothing_is_told():
    accelerator = make_accelerator()
    tracker = Tracker(accelerator, "run", {"a": 1})
    tracker.measured(0.5, {"top1": 0.5})
    tracker.passed(PHASES)
    assert accelerator.trackers == []


def test_the_picture_of_a_mask_is_the_share_that_is_kept():
    weight = torch.zeros(256, 4)
    weight[:64] = 1.0
    weight[64:128, :2] = -1.0
    picture = density(weight)
    assert picture.shape == (128, 4)
    assert (picture[:32] == 255).all()
    assert (picture[32:64, :2] == 255).all()
    assert (picture[32:64, 2:] == 0).all()
    assert (picture[64:] == 0).all()
    half = torch.zeros(2, 256)
    half[:, ::2] = 1.0
    assert np.abs(density(half).astype(int) - 128).max() <= 1
    assert density(nn.Conv2d(3, 5, 2).weight.detach()).shape == (5, 12)


def test_settings_are_what_every_tracker_takes():
    assert flat({"a": 1, "b": None, "c": ["x", 2], "d": True, "e": {}}) == {"a": 1, "c": "x, 2", "d": True}
    assert step_of(0.975) == 975
