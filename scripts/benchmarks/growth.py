"""How the cost of a prune grows with the block size, with the gradients, and with the model.

    python scripts/benchmarks/growth.py --plot growth.png --json growth.json

One ViT with random weights is pruned to 75 % over and over, with one thing changed at a time. Medians of `--repeats`.
"""

import argparse
import statistics
import time

import matplotlib
import torch
from results import Results
from transformers import ViTConfig, ViTForImageClassification

from cap_hf import CAPCompressor, CAPConfig

BASE = {"width": 192, "block_size": 192, "num_grads": 256}
# What is varied, and its values; the others stay as above.
AXES = {
    "block size B": ("block_size", (48, 96, 192, 384)),
    "gradient samples": ("num_grads", (64, 128, 256, 512)),
    "hidden size of the model": ("width", (96, 192, 288)),
}


def measure(width: int, block_size: int, num_grads: int) -> dict[str, float]:
    """Return the seconds of the collection and of all after it, and the number of weights, of one prune."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    batches = [
        {"pixel_values": torch.randn(64, 3, 64, 64), "labels": torch.randint(0, 10, (64,))}
        for _ in range(num_grads // 64)
    ]
    compressor = CAPCompressor(model, CAPConfig(num_grads=num_grads, fisher_block_size=block_size), disable_tqdm=True)
    start = time.perf_counter()
    compressor.collect(batches)
    collected = time.perf_counter()
    report = compressor.prune(0.75)
    done = time.perf_counter()
    weights = sum(layer.num_weights for layer in report.layers)
    return {"collect": collected - start, "prune": done - collected, "weights": weights}


def draw(results: dict[str, list[dict]], path: str) -> None:
    """Draw seconds over each axis, both logarithmic."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.4), sharey=True, layout="constrained")
    for axis, (title, rows) in zip(axes, results.items(), strict=True):
        values = [row["value"] for row in rows]
        for name, label in (("collect", "gradients and Fisher"), ("prune", "elimination and weights")):
            axis.plot(values, [row[name] for row in rows], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", default="growth.png")
    parser.add_argument("--json", metavar="FILE", help="gets the figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(**BASE | {"num_grads": 64})  # compiles the kernels where they are not yet
    total = args.repeats * sum(len(values) for _, values in AXES.values())
    with Results(args, total, keys=("value",)) as results:
        for title, (name, values) in AXES.items():
            for value in values:
                results.measuring(f"{title} {value}")
                runs = []
                for _ in range(args.repeats):
                    runs.append(measure(**BASE | {name: value}))
                    results.advance()
                row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                seconds = {key: [run[key] for run in runs] for key in ("collect", "prune")}
                results.add({"value": value, **row, "seconds": seconds}, "results", title)
    draw(results.content["results"], args.plot)


if __name__ == "__main__":
    main()
