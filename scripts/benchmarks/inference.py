"""How much faster whole models run on the CPU once pruned, against dense models in PyTorch and in what is deployed.

    python scripts/benchmarks/inference.py --json inference.json

ViT-S/16 and ViT-B/16 at 224 pixels with random weights are pruned by CAP on random images: speed depends on where
the zeros are, which the allocation decides, and not on what the model has learnt; in the pattern 1x4 in blocks of 4
consecutive inputs of a row. The dense models run in PyTorch, ONNX Runtime and OpenVINO, the latter
two in int8 as well. Backends take turns within one run; a speed-up is the ratio of their medians, and null where the
other was not measured. `results` in the file has an entry for every model, batch size, sparsity, pattern and dtype.
"""

import argparse
import logging
import tempfile
from dataclasses import replace
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
# What is measured beside the sparse models, and those by the dtype that they compute in.
PEERS = ("dense", "onnxruntime", "onnxruntime_int8", "openvino", "openvino_bf16", "openvino_int8")
OURS = {"float32": "sparse", "int8": "sparse_int8"}
PATTERNS = ("unstructured", "1x4")
# Of the allocation only: a block of 16 fits a ViT-B's Fisher into memory, and weights that stay need no new values.
CONFIG = CAPConfig(num_grads=8, fisher_block_size=16, weight_update="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=PATTERNS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--max_seconds", type=float, default=20.0, help="ends a setting earlier, after three runs")
    parser.add_argument("--checkpoint_dir", type=Path, help="keep the pruned models here, and use those that are here")
    args = parser.parse_args()
    logging.getLogger("cap_hf").setLevel(logging.ERROR)  # at 90 % a random model has layers without weights
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    total = len(args.models) * len(args.patterns) * len(args.sparsities) * len(args.batch_sizes)
    keys = ("model", "batch_size", "sparsity", "pattern", "dtype")
    with Results(args, total, keys) as results, tempfile.TemporaryDirectory() as temporary:
        results.set(config=CONFIG.to_dict())
        for name in args.models:
            folder = (args.checkpoint_dir or Path(temporary)) / name
            for pattern in args.patterns:
                results.measuring(f"pruning {name}, {pattern}")
                prune(name, pattern, args.sparsities, folder / pattern)
                for sparsity in args.sparsities:
                    model = ViTForImageClassification.from_pretrained(folder / pattern / str(sparsity))
                    measure(model, {"model": name, "sparsity": sparsity, "pattern": pattern}, args, results)


def measure(model: PreTrainedModel, what: dict, args: argparse.Namespace, results: Results) -> None:
    """Add a row for every batch size of a pruned model, and every dtype that the sparse one is measured in."""
    what["layer_sparsity_range"] = layer_range(model)

    def add(found: list[Measurement]) -> None:
        here = {each.backend: each for each in found}
        for dtype, backend in OURS.items():
            if backend in here:
                results.add({**what, "dtype": dtype, **compare(here, backend)})
        results.advance()

    _, missing = benchmark(
        model,
        [*PEERS, *OURS.values()],
        args.batch_sizes,
        [args.threads],
        args.runs,
        args.max_seconds,
        lambda text: results.measuring(f"{what['model']}, {what['pattern']} {what['sparsity']}, {text}"),
        add,
    )
    for backend, why in missing.items():
        results.bar.write(f"{backend} was not measured: {why}")
    results.set(not_measured=results.content.get("not_measured", {}) | missing)
    if missing.keys() & {"dense", *OURS.values()}:
        raise SystemExit(f"not everything can be measured: {missing}")


def prune(name: str, pattern: str, sparsities: list[float], folder: Path) -> None:
    """Save a model pruned by CAP's allocation to every sparsity that is not there yet, in single weights or blocks."""
    missing = [sparsity for sparsity in sparsities if not (folder / str(sparsity)).exists()]
    if not missing:
        return
    model = make_vit(MODELS[name])
    config = CONFIG if pattern == "unstructured" else replace(CONFIG, pattern=pattern)
    compressor = CAPCompressor(model, config, disable_tqdm=True)
    compressor.collect(make_batches(8, 4))
    for sparsity in missing:
        compressor.prune(sparsity)
        model.save_pretrained(folder / str(sparsity))


def layer_range(model: PreTrainedModel) -> list[float]:
    """Return the lowest and the highest sparsity of a target."""
    shares = [float((target.weight == 0).float().mean()) for target in find_targets(model)]
    return [min(shares), max(shares)]


def compare(here: dict[str, Measurement], backend: str) -> dict:
    """Return what one entry of `results` says of a sparse backend, beside the others of its setting."""
    sparse = here[backend]

    def speedup(other: str) -> float | None:
        return here[other].seconds / sparse.seconds if other in here else None

    return {
        "batch_size": sparse.batch_size,
        "speedup_vs_torch": speedup("dense"),
        "speedup_vs_onnxruntime": speedup("onnxruntime"),
        "speedup_vs_openvino": speedup("openvino"),
        "speedup_vs_openvino_int8": speedup("openvino_int8"),
        "weight_bytes_vs_dense": sparse.weight_bytes / here["dense"].weight_bytes,
        "max_difference": sparse.max_difference,
        "milliseconds": {
            name: [1000 * each.seconds, 1000 * each.low_seconds, 1000 * each.high_seconds]
            for name, each in here.items()
        },
        "max_differences": {name: each.max_difference for name, each in here.items()},
        "same_top1": {name: each.same_top1 for name, each in here.items()},
    }


if __name__ == "__main__":
    main()
