"""What was measured, as the Hub's own files of evaluation results: `.eval_results/*.yaml`, beside the card's metadata.

The Hub shows these on the model's page and on the leaderboard of the dataset, where that one is a benchmark: then its
`eval.yaml` says which tasks it has. Of any other dataset the card's metadata has to do, which hold the same figures.
https://huggingface.co/docs/hub/eval-results
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from cap_hf.checkpoints.metrics import METRICS
from cap_hf.errors import reason
from cap_hf.hub.card import CardFacts
from cap_hf.hub.names import hub_id, one_line

FOLDER, TASKS_NAME = ".eval_results", "eval.yaml"


def write_eval_results(folder: Path, facts: CardFacts, token: str | None = None) -> None:
    """Write `.eval_results/DATASET.yaml` into a folder that is published, if the dataset is a benchmark of the Hub.

    Args:
        folder: that exists.
        facts: what its card says.
        token: None for the one that huggingface_hub finds.
    """
    if entries := eval_results(facts, token):
        path = folder / FOLDER / f"{entries[0].dataset_id.split('/')[-1]}.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")


def eval_results(facts: CardFacts, token: str | None = None) -> list[EvalResultEntry]:
    """Return the accuracy of a model as the Hub takes it, a share in [0, 1]; nothing where it has none to take.

    Left out is what was measured before weights were rounded to int8, as in the card's metadata, and what needs a probe
    beside the model.

    Args:
        facts: what its card says.
        token: None for the one that huggingface_hub finds.
    """
    dataset, value = hub_id(facts.dataset), facts.sparse.get("top1")
    if dataset is None or value is None or facts.int8:
        return []
    # A leaderboard compares models on the whole split.
    if (facts.run.get("data") or {}).get("max_eval_samples") is not None:
        return []
    task = find_task(dataset, facts.dataset_config, facts.dataset_split, token)
    if task is None:
        return []
    name = next(metric.accuracy for metric in METRICS if metric.key == "top1")
    notes = [name, f"{100 * facts.sparsity:.0f} % of the encoder's weights are 0"]
    if count := facts.sparse.get("num_examples"):
        notes.append(f"{count:,} images")
    return [EvalResultEntry(dataset_id=dataset, task_id=task, value=value, notes=one_line("; ".join(map(str, notes))))]


def find_task(dataset: str, config: str | None, split: str | None, token: str | None = None) -> str | None:
    """Return the task of a benchmark that a config and split of it are; None if it is no benchmark, or out of reach.

    Args:
        dataset: a Hub id.
        config: None for the only one.
        split: None if that is not known, which no task is for.
        token: None for the one that huggingface_hub finds.
    """
    if split is None:  # or it would be taken for that of a task that names none
        return None
    try:
        path = hf_hub_download(dataset, TASKS_NAME, repo_type="dataset", token=token)
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except GatedRepoError as error:  # a kind of missing repository for huggingface_hub, but one that a token opens
        _left_out(dataset, error)
        return None
    except (EntryNotFoundError, RepositoryNotFoundError, OfflineModeIsEnabled):  # no benchmark, or no network
        return None
    except Exception as error:  # nothing here is worth a push that fails
        _left_out(dataset, error)
        return None
    tasks = content.get("tasks") if isinstance(content, dict) else None
    for task in tasks if isinstance(tasks, list) else ():
        asked = (config or "default", split)
        if isinstance(task, dict) and (task.get("config") or "default", task.get("split")) == asked:
            return str(task["id"]) if "id" in task else None
    return None


def _left_out(dataset: str, error: Exception) -> None:
    """Say in one line why a push has no results for a leaderboard, where that is not because there is none."""
    said = one_line(getattr(error, "server_message", None) or reason(error))
    print(f"no .eval_results: {TASKS_NAME} of {dataset} cannot be read: {said}", file=sys.stderr)
