"""The run that made a checkpoint, by its report: what it began with, and the command line that it amounts to.

The model of a `cap-hf finetune` run was pruned before, and recovered; or it was pruned gradually, while it was trained.
"""

import re
import shlex
from dataclasses import asdict
from typing import Any

from cap_hf.budget import KINDS
from cap_hf.checkpoints.folder import Report
from cap_hf.config import CAPConfig, is_number
from cap_hf.data.arguments import DataArguments
from cap_hf.hub.names import one_line, short_name
from cap_hf.method.methods import METHODS

PRUNED, GRADUAL, RECOVERED = "pruned", "gradual", "recovered"
# Arguments that say how a run was watched, shared out or gone on with, not what came of it.
ASIDE = re.compile(
    r"(hub|log|logging|trackio|ddp)_.*|.*_token|push_to_hub|run_name|project|disable_tqdm|resume_from_checkpoint|"
    r"(activation|gradient)_checkpointing|dataloader_(pin_memory|num_workers)"
)
# What of a healing were arguments.
HEALING = ("steps", "batch_size", "learning_rate", "bf16")
ARGUMENT = re.compile(r"[A-Za-z]\w*", re.ASCII)


def kind_of(report: Report) -> str:
    """Return how the checkpoint of a report was made: PRUNED and not trained but to heal, GRADUAL or RECOVERED."""
    training = report.get("training_arguments")
    if training and training.get("sparsity_schedule") is not None:
        return GRADUAL
    return RECOVERED if training is not None or report.get("recovered") else PRUNED


def run_of(report: Report, base_model: str | None = None) -> dict[str, Any]:
    """Return what a report says of its run: models, data, steps, refit, training and healing, as it does.

    Args:
        report: of a checkpoint.
        base_model: another name of the dense model; a recovery did not begin with that one.
    """
    pruning = report.get("pruning")
    named = base_model is not None and kind_of(report) != RECOVERED
    return {
        "model_name_or_path": base_model if named else report.get("model_name_or_path"),
        "model_revision": None if named else report.get("model_revision"),
        "teacher_model_name_or_path": report.get("teacher_model_name_or_path"),
        "data": dict(report.get("data") or {}),
        "training_arguments": dict(report.get("training_arguments") or {}),
        "healing": dict(report.get("healing") or {}),
        "steps": report.get("steps"),
        "budget": pruning.get("budget") if isinstance(pruning, dict) else None,
        # None where nothing is known of it.
        "refit": dict(pruning.get("refit") or {}) if pruning else None,
    }


def command_line(kind: str, run: dict[str, Any], config: dict[str, Any], sparsity: float) -> str | None:
    """Return the `cap-hf` call that made a checkpoint, without its folder; other folders go by their last name.

    Args:
        kind: as `kind_of` says.
        run: as `run_of` says.
        config: the fields of the CAPConfig that the checkpoint was pruned with, if it is known.
        sparsity: share of the targets' weights that are 0.

    Returns:
        The call; None where the report does not say enough.
    """
    model, dataset, training = run["model_name_or_path"], run["data"].get("dataset_name"), run["training_arguments"]
    if not (model and dataset and (training if kind == RECOVERED else config)):
        return None
    arguments: dict[str, Any] = {"model_name_or_path": short_name(model)}
    if run["model_revision"] not in (None, "main"):
        arguments["model_revision"] = run["model_revision"]
    if run["teacher_model_name_or_path"]:
        arguments["teacher_model_name_or_path"] = short_name(run["teacher_model_name_or_path"])
    arguments["dataset_name"] = short_name(dataset)
    usual = asdict(DataArguments())
    data = changed({name: value for name, value in run["data"].items() if name in usual}, usual)
    arguments |= {name: value for name, value in single_values(data).items() if name not in arguments}
    if kind != RECOVERED:
        pruning = changed(config, CAPConfig().to_dict())
        if kind == PRUNED and run["refit"] is not None and bool(run["refit"]) != refits(config):
            # What Python or an earlier version made need not have had what the command does by itself.
            pruning["refit"] = bool(run["refit"])
        # What a gradual run prunes with has the seed of its training.
        arguments |= {name: value for name, value in pruning.items() if kind == PRUNED or name != "seed"}
    if kind == PRUNED and ":" not in str(config.get("allocation")):
        budget = budget_of(run)
        if budget:
            arguments["budget"] = f"{budget['kind']}={budget['requested']:.12g}"
        else:
            arguments["sparsity"] = f"{sparsity:.4f}".rstrip("0").rstrip(".")
    if kind == PRUNED:
        arguments |= {"num_recomputations": len(steps_of(run)) - 1} if steps_of(run) else {}
        healing = single_values(run["healing"])
        arguments |= {f"heal_{name}": healing[name] for name in HEALING if healing.get(name)}
    for name, value in single_values(training).items():
        arguments[name] = short_name(value) if isinstance(value, str) else value
    words = ["cap-hf", "prune" if kind == PRUNED else "finetune"]
    for name, value in arguments.items():
        words += [f"--{name}", *map(argument, value if isinstance(value, list) else [value])]
    return " ".join(shlex.quote(word) for word in words)


def steps_of(run: dict[str, Any]) -> list[float]:
    """Return the sparsities that a model was pruned to one after the other, by its report; none where it was one."""
    steps = run.get("steps")
    if not isinstance(steps, list) or len(steps) < 2 or not all(isinstance(step, (int, float)) for step in steps):
        return []
    return [float(step) for step in steps]


def budget_of(run: dict[str, Any]) -> dict[str, Any] | None:
    """Return the budget that a model was pruned to, by its report, with what its kind is a share of; None without."""
    budget = run.get("budget")
    if not isinstance(budget, dict) or budget.get("kind") not in KINDS:
        return None
    shares = {name: budget.get(name) for name in ("requested", "achieved", "error")}
    if not all(is_number(share) or (name == "error" and share is None) for name, share in shares.items()):
        return None
    return {"kind": budget["kind"], "of": KINDS[budget["kind"]]} | shares


def refits(config: dict[str, Any]) -> bool:
    """Return whether `cap-hf prune` refits with these fields of a CAPConfig."""
    read = CAPConfig.from_dict(config)
    return METHODS[read.method].refits(read)


def changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not the default."""
    return {name: value for name, value in values.items() if value != defaults.get(name)}


def single_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of received JSON that can be arguments, and say what came of a run."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (str, int, float)) and ARGUMENT.fullmatch(name) and not ASIDE.fullmatch(name)
    }


def argument(value: Any) -> str:
    """Return a value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else one_line(value)
