# /// script
# requires-python = ">=3.10"
# dependencies = ["cap_hf[demo,plots]"]
# ///
"""Prune on a machine that is gone afterwards, and publish every checkpoint: for `hf jobs uv run`, and `uv run`.

    bash scripts/wheel.sh          # once: builds dist/cap_hf-...whl, which the job takes
    hf jobs uv run --flavor a10g-small --timeout 4h --secrets HF_TOKEN -v ./dist:/dist -e UV_FIND_LINKS=/dist \
        scripts/jobs/prune.py --hub_model_id user/deit-small --model_name_or_path facebook/deit-small-patch16-224 \
        --dataset_name imagenet-1k --sparsity 0.5 0.75 --heal_steps 300

publishes user/deit-small-sparsity-0.5 and user/deit-small-sparsity-0.75, each with its card. All arguments but
`--hub_model_id` and `--private` are those of `cap-hf prune`, a file of them too. In jobs that train,
scripts/jobs/finetune.py with `--push_to_hub true` publishes by itself.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cap_hf.commands.main import main as cap_hf
from cap_hf.errors import CAPError
from cap_hf.extras import need


def main(argv: Sequence[str] | None = None) -> int:
    """Prune, publish; return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--hub_model_id", required=True, help="user/name; each checkpoint adds its name, such as -sparsity-0.5"
    )
    parser.add_argument("--private", action="store_true", help="create private repositories")
    parser.add_argument("--output_dir", help="gets the checkpoints; default: a temporary folder")
    args, pruning = parser.parse_known_args(argv)
    try:
        check_hub(args.hub_model_id)
    except CAPError as error:
        print(f"prune.py: {error}", file=sys.stderr)
        return 1
    # Not a temporary folder of Python's: what could not be published stays.
    output = Path(args.output_dir or Path(tempfile.mkdtemp()) / "out")
    if code := cap_hf(["prune", *pruning, "--output_dir", str(output)]):
        return code
    if any(each.startswith(("--dry_run", "--plan_for")) for each in pruning):
        # It has printed a plan; what an earlier run has left here is not published.
        return 0
    names = checkpoints_in(output)
    failed = [name for name in names if push(output / name, args)]
    if not names:
        print(f"prune.py: there is no checkpoint in {output}, so nothing was published", file=sys.stderr)
    if failed:
        print(
            f"prune.py: not published: {', '.join(failed)}, in {output} as long as this machine is there",
            file=sys.stderr,
        )
    if failed or not names:
        return 1
    if args.output_dir is None:
        shutil.rmtree(output.parent)
    return 0


def checkpoints_in(output: Path) -> list[str]:
    """Return the names of the checkpoints that a prune has written into a folder, by its report."""
    report = output / "report.json"
    if not report.is_file():
        return []
    return [result["checkpoint"] for result in json.loads(report.read_text())["results"]]


def push(checkpoint: Path, args: argparse.Namespace) -> int:
    """Publish a checkpoint; return an exit code."""
    names = ["--model_name_or_path", str(checkpoint), "--hub_model_id", f"{args.hub_model_id}-{checkpoint.name}"]
    return cap_hf(["push", *names, "--private", str(args.private).lower()])


def check_hub(repo_id: str) -> None:
    """Raise a CAPError if what was pruned could not be published, before hours are spent on it."""
    from huggingface_hub import HfApi

    from cap_hf.hub.publish import check_repo_id, hub_errors

    check_repo_id(repo_id)
    need("matplotlib", "plots")
    with hub_errors(repo_id):
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise CAPError("the Hub token may only read: use one with write rights")


if __name__ == "__main__":
    sys.exit(main())
