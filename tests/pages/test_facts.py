"""The types that a page takes are those that commands write."""

import pytest
from support.runs import benchmark, record, recovered, report, search

from cap_hf import CAPError
from cap_hf.checkpoints.folder import check_types
from cap_hf.pages.facts import Benchmark, Facts, Record, Result


def test_what_runs_write_has_these_types():
    check_types(report(search=search()), Facts, "report.json")
    check_types(report()["results"], list[Result], "results")
    check_types(recovered(), Facts, "report.json")
    check_types(benchmark(), Benchmark, "benchmark.json")
    check_types(record(), Record, "recorded.json")


@pytest.mark.parametrize(("kind", "content"), [(Facts, {"phases": 1}), (Record, {"curve": {"sparsity": ["a"]}})])
def test_other_types_are_refused(kind, content):
    with pytest.raises(CAPError, match="which is no"):
        check_types(content, kind, "here")
