"""Check and measure cap_hf on one GPU in about ten minutes.

    python scripts/benchmarks/gpu.py --json gpu.json

check      CAPCompressor on the GPU against the CPU, every method; 2:4 inference against dense
rate       Fisher and elimination, as a share of the device's peak, which is that of a large matrix product
prune      ViT-S and ViT-B with whole rows; where a model is too large, fewer and fewer of its layers
inference  2:4 against dense, in bfloat16

Every row is written as soon as it is there. One that fails says why, the others go on, and the exit code is 1. `--tiny`
runs all of it on small models, without a GPU too.
"""

import argparse
import gc
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from checks import (
    CHECKS,
    accelerator_on,
    check_inference,
    check_prune,
    check_steps,
    difference_of,
    make_pair,
    make_pixels,
)
from models import make_batches, make_vit
from rates import measure_elimination, measure_fisher, measure_peak, seconds, wait
from results import Results
from transformers import PreTrainedModel

from cap_hf import CAPCompressor, CAPConfig, CAPError, Resources
from cap_hf.errors import reason
from cap_hf.inference.choice import time_in_turns

PARTS = ("check", "rate", "prune", "inference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="gets every row as soon as it is there")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--num_grads", type=int, default=1024, help="of the whole prunes")
    parser.add_argument("--layers", type=int, default=12, help="encoder layers of the models that are pruned whole")
    parser.add_argument("--max_memory", help="for the whole prunes; default: what is free")
    parser.add_argument("--spill_dir", help="a folder on a disk with room; ViT-B with whole rows takes 0.5 TB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small models and few repeats, to see that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("there is no CUDA device: --tiny runs everything on the CPU")
    if args.tiny:
        args.num_grads, args.layers, args.repeats = 16, 2, 2
    logging.getLogger("cap_hf").setLevel(logging.ERROR)  # random weights leave layers without gradients
    rows = [row for part in args.only for row in rows_of(part, args)]
    failed = []
    with Results(args, len(rows), keys=("batch_size", "block_size", "layers")) as results, accelerator_on(args.device):
        for part, name, measure in rows:
            results.measuring(f"{part}: {name}")
            row = attempt(measure)
            results.add({"part": part, "name": name, **row})
            results.advance()
            if "failed" in row:
                failed.append(f"{part}: {name}: {row['failed']}")
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {len(rows)} rows failed:", *failed]))


def attempt(measure: Callable[[], dict]) -> dict:
    """Return a row, or the reason why there is none, and give back the memory that it took."""
    try:
        return measure()
    except Exception as error:  # whatever a driver, a compiler or a lack of memory may do
        return {"failed": reason(error)}
    finally:
        give_back_memory()


def give_back_memory() -> None:
    """Free what nothing refers to, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_of(part: str, args: argparse.Namespace) -> list[tuple[str, str, Callable[[], dict]]]:
    """Return part, name and measurement of each row of a part."""
    device = torch.device(args.device)
    small, large = ("vit-test", "vit-test") if args.tiny else ("vit-small", "vit-base")
    rows: list[tuple[str, Callable[[], dict]]] = []
    if part == "check":
        rows += [(name, lambda name=name: check_prune(name, args.device)) for name in CHECKS]
        rows.append(("steps of the elimination", lambda: check_steps(device)))
        rows.append(("2:4 inference", lambda: check_inference(device)))
    elif part == "rate":
        rows += rate_rows(large, device, args)
    elif part == "prune":
        rows.append((small, lambda: prune_whole(small, args)))
        rows.append((f"{small}, bfloat16", lambda: prune_whole(small, args, fisher_dtype="bfloat16")))
        rows.append((large, lambda: prune_whole(large, args)))
    else:
        rows += [(large, lambda size=size: measure_inference(large, size, device, args)) for size in (1, 8, 64)]
    return [(part, name, measure) for name, measure in rows]


def rate_rows(vit: str, device: torch.device, args: argparse.Namespace) -> list[tuple[str, Callable[[], dict]]]:
    """Return name and measurement of each row of the part `rate`; the peaks come first."""
    peaks: dict[str, dict] = {}
    matrix, sizes = (128, (64, 128)) if args.tiny else (8192, (768, 3072))

    def peak(dtype: str) -> dict:
        peaks[dtype] = measure_peak(device, getattr(torch, dtype), matrix)
        return peaks[dtype]

    def fisher(size: int, dtype: str) -> dict:
        return measure_fisher(Accelerator(), vit, size, dtype, args.num_grads, args.repeats, peaks[dtype])

    def elimination(size: int) -> dict:
        return measure_elimination(Accelerator(), vit, size, args.repeats, peaks["float32"])

    rows = [(f"peak of {dtype}", lambda dtype=dtype: peak(dtype)) for dtype in ("float64", "float32", "bfloat16")]
    for size in sizes:
        rows.append(("Fisher in float32", lambda size=size: fisher(size, "float32")))
        rows.append(("Fisher in bfloat16", lambda size=size: fisher(size, "bfloat16")))
        rows.append(("elimination", lambda size=size: elimination(size)))
    return rows


def measure_inference(vit: str, batch_size: int, device: torch.device, args: argparse.Namespace) -> dict:
    """Measure sparse against dense inference; they take turns."""
    dense, sparse = make_pair(vit, device)
    pixels = make_pixels(dense, batch_size, device)
    difference = difference_of(dense, sparse, pixels)

    def call(model: PreTrainedModel) -> None:
        model(pixel_values=pixels)
        wait(device)

    with torch.inference_mode():
        times = time_in_turns([lambda: call(dense), lambda: call(sparse)], 4 * args.repeats)
    ratios = [one / other for one, other in zip(*times, strict=True)]
    return {
        "batch_size": batch_size,
        "seconds": {"dense": times[0], "sparse": times[1]},
        "speedup": ratios,
        "logits_difference": difference,
    }


def prune_whole(vit: str, args: argparse.Namespace, **changes: object) -> dict:
    """Prune a model with whole rows; where memory or disk do not allow that, with fewer of its layers.

    Raises:
        CAPError, RuntimeError: not even one layer can be pruned.
    """
    refused: dict[str, str] = {}
    for layers in dict.fromkeys(max(1, args.layers // part) for part in (1, 2, 4, 8, args.layers)):
        try:
            return prune_layers(vit, layers, args, **changes) | {"refused": refused}
        except (CAPError, torch.OutOfMemoryError) as error:
            if layers == 1:
                raise
            refused[f"{layers} layers"] = reason(error)
        give_back_memory()
    raise AssertionError("the last number of layers is 1")


def prune_layers(vit: str, layers: int, args: argparse.Namespace, **changes: object) -> dict:
    """Prune a model of so many encoder layers to 50 and to 75 %, and return seconds and peak memory."""
    model = make_vit(vit, num_hidden_layers=layers)
    batches = make_batches(args.num_grads, min(args.num_grads, 64), model.config.image_size)
    config = CAPConfig(num_grads=args.num_grads, fisher_block_size="row", **changes)
    resources = Resources(max_memory=args.max_memory, spill_dir=args.spill_dir)
    compressor = CAPCompressor(model, config, Accelerator(), resources=resources, prunes=2)
    device = compressor.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = {"collect": seconds(device, lambda: compressor.collect(batches))}
    for sparsity in (0.5, 0.75):
        taken[f"prune to {sparsity}"] = seconds(device, lambda sparsity=sparsity: compressor.prune(sparsity))
    report = compressor.report
    return {
        "layers": layers,
        "num_weights": report.num_weights,
        "sparsity": report.sparsity,
        "num_grads": args.num_grads,
        "seconds": taken,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


if __name__ == "__main__":
    main()
