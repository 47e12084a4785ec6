"""Which form of a classifier to deploy on a CPU: top-1 against milliseconds, dense and pruned, in one run and picture.

    python scripts/benchmarks/tradeoff.py --model_name_or_path M --dataset_name D --image_sizes 112 224 \\
        --pruned "one-shot=O/sparsity-0.5 O/sparsity-0.75" "healed=H" --json tradeoff.json --plot tradeoff.png

The dense model runs in PyTorch in float32 and bfloat16, and in OpenVINO in bfloat16 and int8, calibrated on images of
the train split; each pruned checkpoint in float32 and in int8, as `optimize_for_inference` makes it. Top-1 is that on
the same images of the eval split, with the standard error of its difference from the dense float32 model; images of
another size than the image processor's are scaled from the originals. All forms take turns in each batch size.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import datasets
import torch
from results import Results
from transformers import BaseImageProcessor, PreTrainedModel

from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import image_dataset, load_all, load_model
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import calibration_split, collate
from cap_hf.errors import CAPError, reason
from cap_hf.extras import need
from cap_hf.inference.backends import BACKENDS, Backend, Call, Subject
from cap_hf.inference.benchmark import PAUSE
from cap_hf.inference.choice import time_in_turns
from cap_hf.masks import target_sparsity
from cap_hf.targets import find_targets

# Backends of the dense model, and of each pruned one.
DENSE = {
    "float32": "dense",
    "bfloat16": "dense_bf16",
    "OpenVINO bfloat16": "openvino_bf16",
    "OpenVINO int8": "openvino_int8",
}
PRUNED = {"float32": "sparse", "int8": "sparse_int8"}
CALIBRATION, BATCH = 300, 50  # images that int8 of OpenVINO is calibrated on; images at a time for top-1
KEYS = ("image_size", "family", "checkpoint", "form")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="the dense model")
    parser.add_argument("--dataset_name", required=True, help="as cap-hf evaluate takes it")
    parser.add_argument("--pruned", nargs="+", default=[], metavar="FAMILY=PATHS", help="checkpoints by family")
    parser.add_argument("--image_sizes", nargs="+", type=int, required=True)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--max_eval_samples", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--max_seconds", type=float, default=60.0, help="ends a batch size earlier, after three runs")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    try:
        need("matplotlib", "plots")  # asked for before minutes of measuring
        paths = checked(args)
        torch.set_num_threads(args.threads)
        with Results(args, len(args.image_sizes) * (1 + len(paths)), KEYS) as results:
            for size in args.image_sizes:
                measure(args, size, paths, results)
    except CAPError as error:
        raise SystemExit(f"tradeoff.py: {error}") from error
    draw(results.content["results"], args.batch_sizes[-1], args.plot)


def checked(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the family and the path of each pruned checkpoint.

    Raises:
        CAPError: an argument is not as it has to be.
    """
    for name in ("image_sizes", "batch_sizes", "max_eval_samples", "threads", "runs"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise CAPError(f"--{name} {values} must be at least 1")
    for each in args.pruned:
        family, _, paths = each.partition("=")
        if not (family and paths.strip()):
            raise CAPError(f"--pruned {each!r} is no family with its checkpoints: write --pruned 'healed=A B'")
    families = dict(each.split("=", 1) for each in args.pruned)
    return [(family, path) for family, each in families.items() for path in each.split()]


def measure(args: argparse.Namespace, size: int, paths: list[tuple[str, str]], results: Results) -> None:
    """Add a row for each form of each model, for images of one size."""
    data_args = DataArguments(dataset_name=args.dataset_name, max_eval_samples=args.max_eval_samples)
    model, processor, splits = load_all(
        ModelArguments(model_name_or_path=args.model_name_or_path), data_args, args.seed, ["train", "eval"], CALIBRATION
    )
    resize(processor, size)
    batch = collate(images_of(splits["eval"], processor, model, data_args))
    pixels, labels = batch["pixel_values"], batch["labels"]
    calibration = collate(
        images_of(calibration_split(splits["train"], CALIBRATION, args.seed), processor, model, data_args)
    )["pixel_values"]
    results.measuring(f"{size} pixels, dense")
    calls, rows, right = {}, {}, {}
    todo = [("dense", args.model_name_or_path, DENSE), *((family, path, PRUNED) for family, path in paths)]
    kept: list[Backend] = []
    for family, path, forms in todo:
        results.measuring(f"{size} pixels, {path}")
        model = load_model(ModelArguments(model_name_or_path=path)).eval()
        sparsity, subject = target_sparsity(find_targets(model)), Subject(model, {"pixel_values": calibration})
        for form, name in forms.items():
            key = (size, family, path, form)
            try:
                kept.append(BACKENDS[name](subject))
                calls[key] = kept[-1].start(args.threads)
            except CAPError as error:  # not installed, or the processor cannot
                results.bar.write(f"{path} {form} was not measured: {reason(error)}")
                continue
            right[key] = count_right(calls[key], pixels, labels)
            difference = right[key] - right[next(iter(right))]
            rows[key] = dict(zip(KEYS, key, strict=True)) | {
                "sparsity": sparsity,
                "top1": float(right[key].mean()),
                "difference": float(difference.mean()),
                "standard_error": float(difference.std() / len(difference) ** 0.5),
                "milliseconds": {},
            }
        results.advance()
    with torch.inference_mode():
        for count in args.batch_sizes:
            results.measuring(f"{size} pixels, batches of {count}")
            inputs = {"pixel_values": pixels[:count]}
            runs = [partial(call, inputs) for call in calls.values()]
            times = time_in_turns(runs, args.runs, args.max_seconds, pause=PAUSE, warm=True)
            for row, taken in zip(rows.values(), times, strict=True):
                row["milliseconds"][count] = 1000 * statistics.median(taken)
    for row in rows.values():
        results.add(row)


def resize(processor: BaseImageProcessor, size: int) -> None:
    """Let an image processor make squares of this size of all images, without cutting anything off."""
    processor.size = {"height": size, "width": size}
    processor.do_center_crop = False


def images_of(
    split: datasets.Dataset, processor: BaseImageProcessor, model: PreTrainedModel, data_args: DataArguments
) -> list[dict]:
    """Return the examples of a split as the model takes them."""
    return image_dataset(split, processor, model, data_args).__getitems__(range(len(split)))


@torch.inference_mode()
def count_right(call: Call, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return 1 for each image of which the label comes first, else 0."""
    logits = torch.cat([call({"pixel_values": part}) for part in pixels.split(BATCH)])
    return (logits.argmax(dim=1) == labels).float()


def draw(rows: list[dict], batch_size: int, path: Path) -> None:
    """Write a picture with a panel for each size of images, and a line for each form of each family."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    sizes = list(dict.fromkeys(row["image_size"] for row in rows))
    figure = Figure(figsize=(5.2 * len(sizes), 4.2), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        here = [row for row in rows if row["image_size"] == size]
        lines: dict[str, list[dict]] = {}
        for row in here:
            lines.setdefault(f"{row['family']}, {row['form']}", []).append(row)
        for number, (label, points) in enumerate(lines.items()):
            points = sorted(points, key=lambda row: row["milliseconds"][batch_size])
            axes.errorbar(
                [row["milliseconds"][batch_size] / batch_size for row in points],
                [100 * row["top1"] for row in points],
                [100 * row["standard_error"] for row in points],
                marker="so^v"[number % 4] if points[0]["family"] == "dense" else "D",
                markersize=5,
                capsize=2,
                color=f"C{number}",
                linestyle=":",
                label=label,
            )
            for row in points if points[0]["family"] != "dense" else []:
                place = row["milliseconds"][batch_size] / batch_size, 100 * row["top1"]
                text = f"{100 * row['sparsity']:.0f} %"
                axes.annotate(text, place, (5, 4), textcoords="offset points", fontsize=6, color=f"C{number}")
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"milliseconds per image, {batch_size} at a time", fontsize=8)
        axes.set_ylabel("top-1 in %", fontsize=8)
        axes.set_title(f"{size} x {size} pixels", fontsize=9)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
