"""Folders as runs leave them, written by hand: reports, a benchmark, what a run has noted down."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

KINDS = ("attention.attention.query", "attention.output.dense", "intermediate.dense", "output.dense")


def layer_names(blocks: int = 3) -> list[str]:
    """Names of targets as a ViT has them."""
    return [f"vit.encoder.layer.{block}.{kind}" for block in range(blocks) for kind in KINDS]


def pruning(sparsity: float, method: str = "cap", names: list[str] | None = None, **more: Any) -> dict:
    """What a report says of a pruning."""
    layers = []
    for place, name in enumerate(names or layer_names()):
        zeros = min(1000, round(1000 * sparsity) + place)
        layers.append({"name": name, "shape": [10, 100], "num_weights": 1000, "num_zeros": zeros, "loss": 0.25 * place})
    total = sum(layer["num_zeros"] for layer in layers) / (1000 * len(layers))
    facts = {"method": method, "allocation": "global", "pattern": None, "requested_sparsity": sparsity}
    return facts | {"sparsity": total, "layers": layers} | more


def measured(top1: float, drop: bool = True) -> dict:
    """What is measured of a classifier."""
    return {"top1": top1, "top1_se": 0.01, "loss": 1 - top1, "loss_se": 0.01, "num_examples": 400} | (
        {"top1_drop_se": 0.005} if drop else {}
    )


def report(method: str = "cap", sparsities: tuple[float, ...] = (0.5, 0.9), **more: Any) -> dict:
    """A report of `cap-hf prune`."""
    results = [
        {
            "checkpoint": f"sparsity-{sparsity:g}",
            "sparse": measured(0.9 - sparsity / 10),
            "pruning": pruning(sparsity, method),
            "steps": [sparsity],
            "healing": None,
        }
        for sparsity in sparsities
    ]
    phases = [
        {"phase": "load", "seconds": 1.5, "peak_memory_bytes": {"cpu": 2**30}},
        {"phase": "collect", "seconds": 12.0, "peak_memory_bytes": {"cpu": 2**31}},
    ]
    facts = {
        "model_name_or_path": "user/vit-tiny",
        "model_revision": "main",
        "data": {"dataset_name": "digits", "eval_split_name": None},
        "config": {"method": method},
        "seed": 42,
        "num_processes": 1,
        "device": "cpu",
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "dense": measured(0.92, drop=False),
        "sparsity_dense": 0.0,
        "results": results,
        "phases": phases,
    }
    return facts | more


def search(max_drop: float = 0.05) -> dict:
    """What a report says of a search for the sparsity."""
    tried = [
        {"sparsity": 0.5, "score": 0.91, "drop": 0.01, "drop_se": 0.01, "kept": True, "seconds": 1.0},
        {"sparsity": 0.9, "score": 0.81, "drop": 0.11, "drop_se": None, "kept": False, "seconds": 1.0},
    ]
    return {"metric": "top1", "max_drop": max_drop, "dense": 0.92, "evaluations": tried, "sparsity": 0.5}


def recovered(sparsity: float = 0.9) -> dict:
    """A report of `cap-hf finetune`."""
    history = [
        {"step": 1, "loss": 2.0, "learning_rate": 1e-4, "epoch": 0.5},
        {"step": 2, "loss": 1.5, "learning_rate": 5e-5, "epoch": 1.0},
        {"step": 2, "eval_loss": 1.4, "eval_top1": 0.85, "epoch": 1.0},
    ]
    return report(results=None) | {
        "model_name_or_path": "pruned/sparsity-0.9",
        "teacher_model_name_or_path": "user/vit-tiny",
        "training_arguments": {"learning_rate": 1e-4},
        "recovered": measured(0.91),
        "sparse": measured(0.81),
        "sparsity": sparsity,
        "layers": pruning(sparsity)["layers"],
        "log_history": history,
    }


def benchmark(sparsity: float = 0.9) -> dict:
    """What `cap-hf benchmark` writes."""

    def one(backend: str, seconds: float) -> dict:
        low, high = 0.9 * seconds, 1.1 * seconds
        setting = {"backend": backend, "batch_size": 8, "threads": 2, "seconds": seconds}
        return setting | {"low_seconds": low, "high_seconds": high, "speedup": 0.04 / seconds}

    measurements = [one("dense", 0.04), one("sparse", 0.04 * (1 - sparsity) + 0.002)]
    return {"model_name_or_path": "pruned/sparsity-0.9", "sparsity": sparsity, "measurements": measurements}


def record(names: list[str] | None = None) -> dict:
    """What `cap-hf prune --report true` notes down."""
    names = names or layer_names()
    shares = [round(point / 10, 4) for point in range(1, 10)]
    stream = io.BytesIO()
    Image.new("L", (8, 8), 90).save(stream, "PNG")
    image = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    shown = [{"example": 7, "label": "three", "dense": "three", "sparse": "eight", "image": image}]
    spectrum = {"ranks": [1, 2, 4], "values": [1.0, 0.1, 0.001]}
    return {
        "command": "cap-hf prune --model_name_or_path user/vit-tiny --token '***'",
        "curve": {
            "sparsity": shares,
            "marginal": [10.0**-place for place in range(9, 0, -1)],
            "total": [2 * 10.0**-place for place in range(9, 0, -1)],
            "layers": dict.fromkeys(names, shares),
        },
        "spectra": [
            {"name": name, "size": 16, "weights": 16, "samples": 8, "damp": 1e-8, "kinds": {"gradients": spectrum}}
            for name in names[:2]
        ],
        "changed": {"sparsity-0.9": {"images": 400, "changed": 1, "lost": 1, "won": 0, "shown": shown}},
    }


def write(path: Path, content: Any) -> Path:
    """Write a JSON file; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_run(folder: Path, content: dict | None = None, noted: dict | None = None) -> Path:
    """Write the report of a run, and what it has noted down; return its folder."""
    path = write(folder / "report.json", report() if content is None else content)
    if noted is not None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        write(folder / "report" / "recorded.json", noted | {"report_sha256": digest})
    return folder
