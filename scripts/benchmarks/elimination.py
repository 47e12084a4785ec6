"""Measure what inverting and eliminating blocks reach of the processor's fastest matrix product, by size and dtype.

    python scripts/benchmarks/elimination.py --json elimination.json

Operations are those of the mathematics: a factorisation and the inverse from it take B^3, the elimination 2/3 B^3, as
the inverse shrinks; the kernels compute one half of what is symmetric. `float32` is what `cap-hf prune` does first,
with its check; `float64` what it falls back to.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rates import measure_peak, seconds
from results import Results

from cap_hf.collection.solver import BATCH_BYTES
from cap_hf.method.elimination import eliminate
from cap_hf.method.inverses import invert, invert_quickly

CPU = torch.device("cpu")


def make_blocks(size: int, memory: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights `(n, B)` and damped Fishers `(n, B, B)` of random gradients, as many as so many bytes hold."""
    count = max(torch.get_num_threads(), memory // (8 * size**2))
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(size // 2, size, dtype=torch.float64, generator=generator)
    fisher = (gradients.mT @ gradients).div_(len(gradients)).expand(count, -1, -1).contiguous()
    fisher.diagonal(dim1=-2, dim2=-1).add_(0.1)
    return torch.randn(count, size, dtype=torch.float64, generator=generator), fisher


def measure(size: int, dtype: torch.dtype, memory: int, repeats: int, peak: float) -> dict[str, object]:
    """Return the operations per second of the inversion and of the elimination of blocks, and their share of a peak."""
    weights, fisher = make_blocks(size, memory)
    weights = weights.to(dtype)
    fast, ones = dtype == torch.float32, torch.ones(len(fisher), 1, dtype=torch.float64)
    inverse = invert_quickly(fisher, ones)[0] if fast else invert(fisher)
    works = {
        "invert": (1.0, lambda: invert_quickly(fisher, ones) if fast else invert(fisher)),
        "eliminate": (2 / 3, lambda: eliminate(weights, inverse)),
    }
    row: dict[str, object] = {"block_size": size, "dtype": str(dtype).removeprefix("torch."), "blocks": len(weights)}
    for name, (share, work) in works.items():
        taken = statistics.median(seconds(CPU, work) for _ in range(repeats))
        rate = share * size**3 * len(weights) / taken
        row |= {f"{name}_seconds": taken, f"{name}_flops_per_second": rate, f"{name}_share_of_peak": rate / peak}
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block_sizes", type=int, nargs="+", default=[192, 768, 1536, 3072])
    parser.add_argument("--memory", type=int, default=BATCH_BYTES, help="bytes of Fishers at a time")
    parser.add_argument("--matrix", type=int, default=2048, help="of the product whose rate is the peak")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="gets the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with Results(args, 2 * len(args.block_sizes), keys=("block_size", "dtype")) as results:
        for dtype in (torch.float32, torch.float64):
            peak = measure_peak(CPU, dtype, args.matrix)
            results.set(**{f"peak_{str(dtype).removeprefix('torch.')}": peak})
            for size in args.block_sizes:
                results.measuring(f"blocks of {size} in {dtype}")
                results.add(measure(size, dtype, args.memory, args.repeats, peak["flops_per_second"]))
                results.advance()


if __name__ == "__main__":
    main()
