"""Which reports in a folder are of one run: a run may leave there what an earlier one has written, or be followed.

`report.json` of a run tells of its checkpoints, each of which has a report of its own that says the same. Where it says
something else, or the run does not tell of it, another run has written it. A copy of a folder has the same report.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cap_hf.checkpoints.folder import REPORT_NAME
from cap_hf.hub.origin import PRUNED, kind_of
from cap_hf.pages.facts import Facts, Result

EARLIER, LATER, ANOTHER = "an earlier run", "a later run", "another run"


@dataclass
class Run:
    """What one report tells of.

    Attributes:
        name: of its folder, as seen from the page's; "" for that one.
        path: of the report.
        facts: what it says.
        results: what it says of each model; of one in the folder itself the `checkpoint` is "".
        listed: whether these are models in folders below its own.
        when: as of `Model`.
    """

    name: str
    path: Path
    facts: Facts
    results: list[Result]
    listed: bool
    when: str = ""

    @property
    def title(self) -> str:
        """Return the name of its folder, and when it was run where that is not as expected."""
        return f"{self.name} ({self.when})" if self.when else self.name


def sort_out(runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """Return the runs, each with models that no other one tells of, and in a line each what should be known of that.

    Args:
        runs: of all reports in a folder, those further up first.
    """
    runs = list(runs)
    above = {run.path.parent: run for run in runs if run.listed}
    kept: list[Run] = []
    notes: list[str] = []
    for run in runs:
        parent = None if run.listed else above.get(run.path.parent.parent)
        own = (
            []
            if parent is None
            else [each for each in parent.results if each.get("checkpoint") == run.path.parent.name]
        )
        pruned = kind_of(run.facts) == PRUNED and not run.listed
        if pruned and any(_same(other, each, run) for other in above.values() for each in (own or other.results)):
            # The checkpoint of a run, or a copy of it, such as a compressed one.
            continue
        kept.append(run)
        if parent is None or not (own or pruned):
            continue
        when = _when(run, parent)
        run.when = when if pruned else ""
        if own:
            parent.results = [each for each in parent.results if each not in own]
            told = f"was written by {when} than {REPORT_NAME} beside it tells of, whose own figures of it are left out"
        else:
            told = f"is of {when} into the same folder, which {REPORT_NAME} there does not tell of"
        notes.append(f"{run.name} {told}.")
    return _without_copies(kept), notes


def _without_copies(runs: list[Run]) -> list[Run]:
    """Return the runs, each model of several equal reports with the first of these that still tells of it.

    Equal reports are copies of one where that says when the run began, or has what a training logged and took: what was
    started twice differs there. Of reports that say neither nothing is left out.
    """
    kept: list[Run] = []
    told: dict[str, set[str]] = {}
    for run in runs:
        if run.facts.get("started") or run.facts.get("log_history"):
            # As text, where what is no number equals itself.
            before = told.setdefault(json.dumps(run.facts, sort_keys=True), set())
            models = [json.dumps(result, sort_keys=True) for result in run.results]
            results = [result for result, model in zip(run.results, models, strict=True) if model not in before]
            if before and not results:
                continue
            run.results = results
            before.update(models)
        kept.append(run)
    return kept


def _same(run: Run, result: Result, other: Run) -> bool:
    """Return whether the report of a checkpoint says what a run says of one of its models."""
    began = [each.facts.get("started") for each in (run, other)]
    if all(began) and began[0] != began[1]:
        return False
    (own,) = other.results
    parts: tuple[str, ...] = ("pruning", "sparse", "healing")
    said = [[dict(each).get(part) for part in parts] for each in (result, own)]
    return bool(own.get("pruning")) and said[0] == said[1] and run.facts.get("dense") == other.facts.get("dense")


def _when(run: Run, parent: Run) -> str:
    """Return when a run was, compared with another one that has written into the same folder."""
    own, others = run.facts.get("started"), parent.facts.get("started")
    if not own or not others or own == others:
        return ANOTHER
    return EARLIER if own < others else LATER
