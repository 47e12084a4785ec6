"""How much faster whole models run on the CPU once CAP has pruned them, against dense PyTorch and dense ONNX Runtime.

    python scripts/benchmarks/inference.py --json inference.json

ViT-S/16 and ViT-B/16 at 224 pixels with random weights are pruned by CAP on random images: speed depends on where
the zeros are, which the allocation decides, and not on what the model has learnt. Backends take turns within one run;
a speed-up is the ratio of their medians. `results` in the file has an entry for every model, batch size and sparsity.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
import transformers
from models import make_batches, make_vit
from results import Results
from transformers import PreTrainedModel, ViTForImageClassification

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.inference.benchmark import Measurement, benchmark
from cap_hf.targets import find_targets

MODELS = {"vit-small-patch16-224": "vit-small", "vit-base-patch16-224": "vit-base"}
# Of the allocation only: a block of 16 fits a ViT-B's Fisher into memory, and weights that stay need no new values.
CONFIG = CAPConfig(num_grads=8, fisher_block_size=16, weight_update="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--max_seconds", type=float, default=20.0, help="ends a setting earlier, after three runs")
    parser.add_argument("--checkpoint_dir", type=Path, help="keep the pruned models here, and use those that are here")
    args = parser.parse_args()
    logging.getLogger("cap_hf").setLevel(logging.ERROR)  # at 90 % a random model has layers without weights
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    total = len(args.models) * len(args.sparsities) * len(args.batch_sizes)
    keys = ("model", "batch_size", "sparsity")
    with Results(args, total, keys) as results, tempfile.TemporaryDirectory() as temporary:
        results.set(config=CONFIG.to_dict())
        for name in args.models:
            folder = (args.checkpoint_dir or Path(temporary)) / name
            results.measuring(f"pruning {name}")
            prune(name, args.sparsities, folder)
            for sparsity in args.sparsities:
                measure(name, sparsity, folder / str(sparsity), args, results)


def measure(name: str, sparsity: float, folder: Path, args: argparse.Namespace, results: Results) -> None:
    """Add a row for every batch size of a pruned model."""
    model = ViTForImageClassification.from_pretrained(folder)
    layers = layer_range(model)

    def add(found: list[Measurement]) -> None:
        results.add(compare(name, sparsity, layers, {each.backend: each for each in found}))
        results.advance()

    _, missing = benchmark(
        model,
        ["dense", "sparse", "onnxruntime"],
        args.batch_sizes,
        [args.threads],
        args.runs,
        args.max_seconds,
        lambda text: results.measuring(f"{name}, {sparsity}, {text}"),
        add,
    )
    if missing:
        raise SystemExit(f"not everything can be measured: {missing}")


def prune(name: str, sparsities: list[float], folder: Path) -> None:
    """Save a model pruned by CAP's allocation to every sparsity that is not there yet."""
    missing = [sparsity for sparsity in sparsities if not (folder / str(sparsity)).exists()]
    if not missing:
        return
    model = make_vit(MODELS[name])
    compressor = CAPCompressor(model, CONFIG, disable_tqdm=True)
    compressor.collect(make_batches(8, 4))
    for sparsity in missing:
        compressor.prune(sparsity)
        model.save_pretrained(folder / str(sparsity))


def layer_range(model: PreTrainedModel) -> list[float]:
    """Return the lowest and the highest sparsity of a target."""
    shares = [float((target.weight == 0).float().mean()) for target in find_targets(model)]
    return [min(shares), max(shares)]


def compare(name: str, sparsity: float, layers: list[float], here: dict[str, Measurement]) -> dict:
    """Return one entry of `results`."""
    sparse = here["sparse"]
    return {
        "model": name,
        "batch_size": sparse.batch_size,
        "sparsity": sparsity,
        "speedup_vs_torch": here["dense"].seconds / sparse.seconds,
        "speedup_vs_onnxruntime": here["onnxruntime"].seconds / sparse.seconds,
        "weight_bytes_vs_dense": sparse.weight_bytes / here["dense"].weight_bytes,
        "layer_sparsity_range": layers,
        "max_difference": sparse.max_difference,
        "milliseconds": {
            backend: [1000 * each.seconds, 1000 * each.low_seconds, 1000 * each.high_seconds]
            for backend, each in here.items()
        },
    }


if __name__ == "__main__":
    main()
