"""How fast one Linear layer is in int8, sparse in 1x4 blocks, against dense int8 and float32 and PyTorch's sparse int8.

    python scripts/benchmarks/int8.py --json int8.json

Layers have the shapes of ViT-S and ViT-B, random weights, and a share of groups of four consecutive inputs that are
zero. All forms of a layer take turns within one run, and a ratio is that of their medians; on a machine that does other
work too, `--statistic min` compares the fastest runs. Forms:
    dense            nn.Linear in float32
    dense_int8       torch.ops.quantized.linear_dynamic on oneDNN: one scale for the input, found anew
    our_dense_int8   cap_hf's DenseInt8Linear: one scale per token, then oneDNN
    sparse           cap_hf's SparseLinear in float32
    sparse_int8      cap_hf's SparseInt8Linear: one scale per token
    torch_sparse     torch.ops.sparse.qlinear (FBGEMM, 1x4): the input is quantised with a scale that is known
                     beforehand, and the output comes back from int8: on x86 it has no form that finds scales itself
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from results import Results
from torch import nn

from cap_hf.inference.choice import random_linear, time_in_turns
from cap_hf.inference.int8_linear import DenseInt8Linear, SparseInt8Linear, has_dense_int8
from cap_hf.inference.linear import SparseLinear
from cap_hf.inference.operators import has_int8_kernel, has_kernel

SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
STATISTICS = {"median": statistics.median, "min": min}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--tokens", nargs="+", type=int, default=[197, 1576])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9], help="multiples of 0.05")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--max_seconds", type=float, default=3.0, help="ends a layer earlier, after three runs")
    parser.add_argument("--statistic", choices=list(STATISTICS), default="median")
    args = parser.parse_args()
    if not (has_kernel() and has_int8_kernel() and has_dense_int8()):
        raise SystemExit("this needs a C++ compiler and an x86 processor with VNNI")
    # PyTorch says at each use that its quantised tensors will go.
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
    settings = [
        (threads, rows, cols, tokens, sparsity)
        for threads in args.threads
        for rows, cols in SHAPES
        for tokens in args.tokens
        for sparsity in args.sparsities
    ]
    keys = ("threads", "rows", "cols", "tokens", "sparsity")
    with Results(args, len(settings), keys) as results, torch.inference_mode():
        for setting in settings:
            named = dict(zip(keys, setting, strict=True))
            results.measuring(str(named))
            torch.set_num_threads(named["threads"])
            results.add(named | measure(*setting[1:], args))
            results.advance()


def measure(rows: int, cols: int, tokens: int, sparsity: float, args: argparse.Namespace) -> dict:
    """Return the milliseconds of every form of a layer, and how many times faster sparse int8 is than each other."""
    steps = round(sparsity / 0.05)
    linear = random_linear(rows, cols, steps, steps, True)
    x = torch.randn(1, tokens, cols, generator=torch.Generator().manual_seed(1))
    calls = forms(linear, x)
    times = time_in_turns(list(calls.values()), args.runs, args.max_seconds)
    taken = {name: STATISTICS[args.statistic](each) for name, each in zip(calls, times, strict=True)}
    ours = taken["sparse_int8"]
    return {
        "speedup_vs": {name: seconds / ours for name, seconds in taken.items() if name != "sparse_int8"},
        "milliseconds": {name: 1000 * seconds for name, seconds in taken.items()},
    }


def forms(linear: nn.Linear, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a call of each form of a layer."""
    layers = {
        "dense": linear,
        "our_dense_int8": DenseInt8Linear(linear),
        "sparse": SparseLinear(linear),
        "sparse_int8": SparseInt8Linear(linear),
    }
    calls: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda layer=layer: layer(x)
        for name, layer in layers.items()  # type: ignore[misc]
    }
    scales = (linear.weight.abs().amax(dim=1).double() / 127).clamp_min(1e-9)
    zeros = torch.zeros(len(scales), dtype=torch.long)
    weight = torch.quantize_per_channel(linear.weight.detach(), scales, zeros, 0, torch.qint8)
    torch.backends.quantized.engine = "onednn"
    dense = torch.ops.quantized.linear_prepack(weight, linear.bias)
    torch.backends.quantized.engine = "fbgemm"
    sparse = torch.ops.sparse.qlinear_prepack(weight, linear.bias, 1, 4)
    x_scale, y_scale = float(x.abs().max()) / 127, float(linear(x).abs().max()) / 127

    def torch_sparse() -> torch.Tensor:
        quantized = torch.quantize_per_tensor(x, x_scale, 128, torch.quint8)
        return torch.ops.sparse.qlinear(quantized, sparse, y_scale, 128).dequantize()

    calls["dense_int8"] = lambda: torch.ops.quantized.linear_dynamic(x, dense)
    calls["torch_sparse"] = torch_sparse
    return calls


if __name__ == "__main__":
    main()
