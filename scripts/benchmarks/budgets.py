"""What comes out of budgets: their shares, and top-1 of a budget of multiply-adds beside a plain sparsity of as many.

    python scripts/benchmarks/budgets.py --model_name_or_path M --dataset_name D --seeds 0 1 \\
        --budget flops=0.4 flops=0.25 bytes=0.25 latency=0.5 --json budgets.json

Budgets of several kinds are spent from one collection per seed, and refitted as `cap-hf prune` does by default;
arguments that are not named here are those of that command (`--max_eval_samples 1000`). `achieved` is counted, or
measured, with its standard error `error`. Beside each budget of multiply-adds stands the sparsity of the whole model
with which as many are left, or a little fewer: `gain` is what the budget is better by, in top-1, with the standard
error of the paired differences. Rows have shares in [0, 1]; the table has points, and means over the seeds.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
from accuracy import mean_drop
from results import Results

from cap_hf.budget import Budget, parse_budgets
from cap_hf.commands.arguments import parse
from cap_hf.commands.preparing import Run, prepare
from cap_hf.commands.prune import KINDS
from cap_hf.commands.prune_arguments import Asked
from cap_hf.compressor import CAPCompressor
from cap_hf.data.evaluation import AccuracyEvaluation, score_all
from cap_hf.distributed.accelerator import make_accelerator
from cap_hf.errors import CAPError
from cap_hf.inference.positions import count_positions
from cap_hf.patterns import unit_of
from cap_hf.report import PruneReport

KEYS = ("budget", "seed")
HALVINGS = 16  # of the interval that a sparsity is looked for in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="the dense model")
    parser.add_argument("--dataset_name", required=True, help="as cap-hf prune takes it")
    parser.add_argument("--budget", nargs="+", required=True, metavar="KIND=SHARE", help="of one kind or several")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", metavar="FILE", type=Path, required=True, help="gets the rows")
    args, args.passed_on = parser.parse_known_args()
    try:
        budgets = [parse_budgets([text])[0] for text in args.budget]
        with Results(args, len(args.seeds) * len(budgets), KEYS) as results:
            for seed in args.seeds:
                measure(args, seed, budgets, results)
    except CAPError as error:
        raise SystemExit(f"budgets.py: {error}") from error
    print(table(results.content["results"]))


def measure(args: argparse.Namespace, seed: int, budgets: list[Budget], results: Results) -> None:
    """Add a row for each budget, of one collection."""
    command = ["--model_name_or_path", args.model_name_or_path, "--dataset_name", args.dataset_name]
    asked = Asked(*parse([*command, "--seed", str(seed), *args.passed_on], "prune", "", *KINDS))
    asked.sparsities = list(budgets)
    results.measuring(f"seed {seed}, collection")
    run = prepare(asked, make_accelerator())
    dense = hits(run)
    compressor = run.compressor.collect(run.loader)
    for budget in asked.sparsities:
        results.measuring(f"seed {seed}, {budget}")
        assert isinstance(budget, Budget)
        report, found = pruned(run, budget)
        assert report.budget is not None
        spent = report.budget
        row = dict(zip(KEYS, (str(budget), seed), strict=True)) | {"kind": budget.kind, "asked": budget.share}
        row |= {"achieved": spent.achieved, "predicted": spent.predicted, "error": spent.error}
        row |= {"sparsity": report.sparsity, "num_examples": len(found)}
        row |= compared("drop", dense, found) | {"dense": float(dense.mean()), "top1": float(found.mean())}
        if budget.kind == "flops":
            sparsity, left = sparsity_of(compressor, budget)
            results.measuring(f"seed {seed}, {sparsity:.1%} beside {budget}")
            _, plain = pruned(run, sparsity)
            row |= {"plain_sparsity": sparsity, "plain_flops": left, "plain_top1": float(plain.mean())}
            row |= compared("gain", found, plain)
        results.add(row)
        results.advance()


def pruned(run: Run, amount: float | Budget) -> tuple[PruneReport, torch.Tensor]:
    """Prune and refit the model; return the report of that, and of each image whether it is right then."""
    report = run.compressor.prune(amount)
    if run.refits:
        report = run.compressor.refit(run.loader)
    return report, hits(run)


def hits(run: Run) -> torch.Tensor:
    """Return 1 for each image of which the label comes first, else 0, `(n,)` float64."""
    figures = run.evaluation and run.evaluation.figures
    if not isinstance(figures, AccuracyEvaluation):
        raise SystemExit("top-1 needs a classifier, and images with labels to evaluate on")
    return score_all(run.model, figures.loader, run.accelerator, True)["top1"].double()


def compared(name: str, better: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Return by how much the one is right more often than the other, and the standard error, image by image."""
    differences = better - other
    return {name: float(differences.mean()), f"{name}_se": float(differences.std()) / math.sqrt(len(differences))}


def sparsity_of(compressor: CAPCompressor, budget: Budget) -> tuple[float, float]:
    """Return the least sparsity of the model that leaves no more multiply-adds than a budget, and their share."""
    paths, unit = compressor.paths, unit_of(compressor.config.structure)
    assert paths is not None
    assert budget.example_inputs is not None
    positions = count_positions(compressor.model, paths.targets, budget.example_inputs)
    total = sum(positions[target.name] * target.weight.numel() for target in paths.targets)

    def left(sparsity: float) -> float:
        removed = paths.allocate(compressor.config, sparsity)
        gone = [unit * int(counts.sum()) for counts in removed]
        return 1 - sum(positions[each.name] * own for each, own in zip(paths.targets, gone, strict=True)) / total

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) <= budget.share else (middle, high)
    return high, left(high)


def table(rows: list[dict]) -> str:
    """Return a line for each budget as Markdown: means over the seeds, with errors over seeds and images."""
    dense, count = 100 * statistics.mean(row["dense"] for row in rows), rows[0]["num_examples"]
    lines = [f"Dense: {dense:.2f} % of {count:,} images.", ""]
    lines += ["| budget | came out | predicted | sparsity | top-1 lost | plain sparsity | plain flops | better by |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        same = [row for row in rows if row["budget"] == budget]
        cells = [budget, *(mean(same, name, 4) for name in ("achieved", "predicted", "sparsity")), mean_drop(same)]
        gains = [{"drop": row["gain"], "drop_se": row["gain_se"]} for row in same if "gain" in row]
        cells += [mean(same, "plain_sparsity", 4), mean(same, "plain_flops", 4), mean_drop(gains)]
        if same[0]["error"] is not None:
            cells[1] = ", ".join(f"{row['achieved']:.4f} ± {row['error']:.4f}" for row in same)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(rows: list[dict], name: str, digits: int) -> str:
    """Return the mean of an entry that all rows have; `-` where they have none."""
    values = [row.get(name) for row in rows]
    return "-" if None in values else f"{statistics.mean(values):.{digits}f}"


if __name__ == "__main__":
    main()
