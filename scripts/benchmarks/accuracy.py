"""What pruning costs in accuracy: every method, seed and number of healing steps at every sparsity, one table.

    python scripts/benchmarks/accuracy.py --model_name_or_path M --dataset_name D --methods cap sparsegpt wanda \\
        magnitude obs --sparsity 0.5 0.6 0.75 0.85 0.9 --seeds 0 1 2 --heal_steps 0 100 300 --json accuracy.json

Each combination of method, seed and healing steps is one run of `cap-hf prune`; arguments that are not named here are
passed on to it (`--max_eval_samples 1000`). Rows that FILE already has are not measured again, so that what was
stopped goes on. Checkpoints lie in a temporary folder (in TMPDIR) while a run lasts.

A row has shares in [0, 1]: the accuracy (of a backbone that of k-NN), how much of the dense model's it lost, and their
standard errors over the images; and the seconds of its run, of all sparsities together, without evaluations. The table
has the means over the seeds, in points, with their standard errors over seeds and images.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from compare import read
from results import Results

from cap_hf.checkpoints.metrics import METRICS
from cap_hf.commands.main import main as cap_hf

KEYS = ("method", "seed", "sparsity", "heal_steps")
# Rows of runs that differ in these do not belong into one table.
SAME = ("model_name_or_path", "dataset_name", "passed_on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="the dense model")
    parser.add_argument("--dataset_name", required=True, help="as cap-hf prune takes it")
    parser.add_argument("--methods", nargs="+", default=["cap", "sparsegpt", "wanda", "magnitude", "obs"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.75, 0.85, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heal_steps", type=int, nargs="+", default=[0])
    parser.add_argument("--json", metavar="FILE", type=Path, required=True, help="gets the rows, after each run")
    args, args.passed_on = parser.parse_known_args()
    rows = earlier_rows(args)
    there = {tuple(row[key] for key in KEYS) for row in rows}
    runs = {
        (method, seed, steps): missing
        for seed, steps, method in product(args.seeds, args.heal_steps, args.methods)
        if (missing := [each for each in args.sparsity if (method, seed, each, steps) not in there])
    }
    with Results(args, len(runs), KEYS, rows) as results:
        for (method, seed, steps), sparsities in runs.items():
            results.measuring(f"{method}, seed {seed}, {steps} healing steps")
            for row in prune(args, method, seed, steps, sparsities):
                results.add(row)
            results.advance()
    print(table(results.content["results"]))


def earlier_rows(args: argparse.Namespace) -> list[dict]:
    """Return the rows that the file has; rows of another model or with other arguments end the program."""
    if not args.json.exists():
        return []
    content = read(args.json)
    before = content.get("arguments", {})
    for name in SAME:
        if before.get(name) != getattr(args, name):
            raise SystemExit(f"{args.json} has {name} {before.get(name)!r}: name another file with --json")
    return content.get("results", [])


def prune(args: argparse.Namespace, method: str, seed: int, steps: int, sparsities: Sequence[float]) -> list[dict]:
    """Run `cap-hf prune`, and return a row for each sparsity; a run that fails ends the program."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        command = ["prune", "--model_name_or_path", args.model_name_or_path, "--dataset_name", args.dataset_name]
        command += ["--method", method, "--seed", str(seed), "--sparsity", *map(str, sparsities)]
        command += ["--heal_steps", str(steps)] if steps else []
        if cap_hf([*command, *args.passed_on, "--output_dir", str(output)]):
            raise SystemExit(f"cap-hf {' '.join(command)} has failed; the rows before it are in {args.json}")
        return rows_of(json.loads((output / "report.json").read_text()), steps)


def rows_of(report: dict, steps: int) -> list[dict]:
    """Return a row for each sparsity of the report of a run."""
    dense = report["dense"] or {}
    key = next((metric.key for metric in METRICS if metric.drop and metric.key in dense), None)
    if key is None:
        raise SystemExit("no accuracy was measured: it needs images with labels, and --do_eval")
    seconds = sum(phase["seconds"] for phase in report["phases"] if not phase["phase"].startswith("evaluate"))
    return [
        {
            "method": result["pruning"]["method"],
            "seed": report["seed"],
            "sparsity": asked_or_found(result["pruning"]),
            "heal_steps": steps,
            key: result["sparse"][key],
            f"{key}_se": result["sparse"][f"{key}_se"],
            "drop": dense[key] - result["sparse"][key],
            "drop_se": result["sparse"][f"{key}_drop_se"],
            "dense": dense[key],
            "dense_se": dense[f"{key}_se"],
            "num_examples": dense["num_examples"],
            "seconds": seconds,
        }
        for result in report["results"]
    ]


def asked_or_found(pruning: dict) -> float:
    """Return the sparsity that a prune was asked for, or that came out where it was asked for a budget."""
    asked = pruning["requested_sparsity"]
    return pruning["sparsity"] if asked is None else asked


def table(rows: list[dict]) -> str:
    """Return the mean drops of all seeds as Markdown, in points, with their standard errors."""
    dense, error = (100 * statistics.mean(row[name] for row in rows) for name in ("dense", "dense_se"))
    sparsities = sorted({row["sparsity"] for row in rows})
    lines = [
        f"Points below the dense model's {dense:.2f} ± {error:.2f} %, on {rows[0]['num_examples']:,} images:",
        "",
        f"| method | healing steps | seeds | {' | '.join(f'{100 * each:g} %' for each in sparsities)} |",
        f"| --- | ---: | ---: |{' ---: |' * len(sparsities)}",
    ]
    for steps, method in dict.fromkeys((row["heal_steps"], row["method"]) for row in rows):
        same = [row for row in rows if (row["heal_steps"], row["method"]) == (steps, method)]
        cells = [mean_drop([row for row in same if row["sparsity"] == sparsity]) for sparsity in sparsities]
        lines.append(f"| {method} | {steps} | {len({row['seed'] for row in same})} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_drop(rows: list[dict]) -> str:
    """Return the mean drop of some seeds with its standard error, in points; `-` if there are none.

    All seeds are measured on the same images, so that the error over these does not fall with the number of seeds,
    and that of their choice comes to it.
    """
    if not rows:
        return "-"
    drops = [row["drop"] for row in rows]
    images = statistics.mean(row["drop_se"] ** 2 for row in rows)
    seeds = statistics.variance(drops) / len(drops) if len(drops) > 1 else 0.0
    return f"{100 * statistics.mean(drops):.2f} ± {100 * (images + seeds) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
