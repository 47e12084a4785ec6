"""What another run has left in a run's folder is told from what belongs to it."""

from pathlib import Path

import pytest
from support.runs import recovered, report

from cap_hf.pages.belonging import Run, sort_out


def whole(content: dict, name: str = "") -> Run:
    """The report of a run, in a folder below the page's."""
    return Run(name, Path("/page", name, "report.json"), content, [dict(each) for each in content["results"]], True)


def single(content: dict, name: str) -> Run:
    """The report of a checkpoint."""
    return Run(name, Path("/page", name, "report.json"), content, [{**content, "checkpoint": ""}], False)


def checkpoint(content: dict, place: int = 0) -> dict:
    """What a run writes into the folder of one of its checkpoints."""
    return {**content, "results": None} | content["results"][place]


def test_the_checkpoints_of_a_run_are_no_runs():
    content = report(started="2026-01-02T00:00:00+00:00")
    runs = [whole(content), *(single(checkpoint(content, place), f"sparsity-{place}") for place in (0, 1))]
    kept, notes = sort_out(runs)
    assert [run.name for run in kept] == [""]
    assert notes == []
    # Nor is a copy of one, such as a compressed one, wherever it lies.
    kept, notes = sort_out([*runs, single(checkpoint(content), "elsewhere/small")])
    assert [run.name for run in kept] == [""]


@pytest.mark.parametrize(
    ("begun", "last", "when"),
    [
        ("2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "an earlier run"),
        ("2026-01-03T00:00:00+00:00", "2026-01-02T00:00:00+00:00", "a later run"),
        (None, "2026-01-02T00:00:00+00:00", "another run"),
        (None, None, "another run"),
    ],
)
def test_a_checkpoint_that_its_run_does_not_tell_of_is_of_another_one(begun, last, when):
    old = report(sparsities=(0.7,), started=begun)
    kept, notes = sort_out([whole(report(started=last)), single(checkpoint(old), "sparsity-0.7")])
    assert [(run.name, run.when) for run in kept] == [("", ""), ("sparsity-0.7", when)]
    assert kept[1].title == f"sparsity-0.7 ({when})"
    told = f"sparsity-0.7 is of {when} into the same folder, which report.json there does not tell of."
    assert notes == [told]


def test_of_a_checkpoint_that_was_written_again_its_own_report_counts():
    """A second run was killed after its first checkpoint: report.json is the first one's."""
    first, second = report(started="2026-01-01"), report("magnitude", started="2026-01-02")
    runs = [
        whole(first, "o"),
        single(checkpoint(second), "o/sparsity-0.5"),
        single(checkpoint(first, 1), "o/sparsity-0.9"),
    ]
    kept, notes = sort_out(runs)
    assert [run.name for run in kept] == ["o", "o/sparsity-0.5"]
    assert [each["checkpoint"] for each in kept[0].results] == ["sparsity-0.9"]
    assert notes == [
        "o/sparsity-0.5 was written by a later run than report.json beside it tells of, whose own figures of it are "
        "left out."
    ]
    # With all figures the same it is still another one.
    again = report(started="2026-01-02")
    kept, _ = sort_out([whole(first, "o"), single(checkpoint(again), "o/sparsity-0.5")])
    assert [run.when for run in kept] == ["", "a later run"]


def test_a_recovery_within_a_run_is_a_run_of_its_own():
    kept, notes = sort_out([whole(report()), single(recovered(), "recovered")])
    assert [(run.name, run.when) for run in kept] == [("", ""), ("recovered", "")]
    assert notes == []
    # In the place of a checkpoint too, whose figures are no longer those of what lies there.
    kept, notes = sort_out([whole(report()), single(recovered(), "sparsity-0.9")])
    assert [(run.name, run.when) for run in kept] == [("", ""), ("sparsity-0.9", "")]
    assert [each["checkpoint"] for each in kept[0].results] == ["sparsity-0.5"]
    assert len(notes) == 1


def test_runs_beside_each_other_are_left_alone():
    runs = [whole(report(), "a"), whole(report("magnitude"), "b"), single(checkpoint(report("obs")), "c")]
    kept, notes = sort_out(runs)
    assert [(run.name, run.when) for run in kept] == [("a", ""), ("b", ""), ("c", "")]
    assert notes == []


def test_copies_of_a_recovery_are_no_runs():
    made = recovered() | {"started": "2026-01-01"}
    kept, notes = sort_out([single(made, "r"), single(dict(made), "r-small"), single(dict(made), "elsewhere/r")])
    assert ([run.name for run in kept], notes) == (["r"], [])
    # Of one that was started again, or with another seed, the report says so.
    for change in ({"started": "2026-01-02"}, {"seed": 7}, {"recovered": None}):
        kept, _ = sort_out([single(made, "r"), single(made | change, "s")])
        assert [run.name for run in kept] == ["r", "s"]
    # In the place of a checkpoint it is a copy too, and yet what the run says of that is no longer so.
    kept, notes = sort_out([whole(report(), "o"), single(made, "r"), single(dict(made), "o/sparsity-0.9")])
    assert [each["checkpoint"] for each in kept[0].results] == ["sparsity-0.5"]
    assert len(notes) == 1
    assert [run.name for run in kept] == ["o", "r"]


def test_a_copy_of_a_run_is_no_run():
    content = report(started="2026-01-01") | {"dense": {"top1": 0.9, "loss": float("nan")}}
    runs = [whole(content, "a"), whole(dict(content), "b")]
    runs += [single(checkpoint(content, place), f"{name}/sparsity-{place}") for name in "ab" for place in (0, 1)]
    kept, notes = sort_out(runs)
    assert ([run.name for run in kept], notes) == (["a"], [])
    # One that was run again is, and so is one of which it is not known.
    assert len(sort_out([whole(content, "a"), whole(content | {"started": "2026-01-02"}, "b")])[0]) == 2
    assert len(sort_out([whole(report(), "a"), whole(report(), "b")])[0]) == 2


def test_of_a_copy_counts_what_was_overwritten_in_the_first():
    content, later = report(started="2026-01-01"), report("magnitude", started="2026-01-02")
    runs = [whole(content, "a"), single(checkpoint(later), "a/sparsity-0.5"), whole(dict(content), "b")]
    kept, _ = sort_out(runs)
    told = {run.name: [each["checkpoint"] for each in run.results] for run in kept}
    assert told == {"a": ["sparsity-0.9"], "a/sparsity-0.5": [""], "b": ["sparsity-0.5"]}
