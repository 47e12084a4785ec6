"""What a run says of itself."""

import torch

from cap_hf.report import Evaluated, LayerReport, Phases, PruneReport, SearchReport, peak_memory, versions


def layer(name: str, zeros: int, loss: float | None) -> LayerReport:
    return LayerReport(name, (2, 5), 10, zeros, "digest", 5, loss)


def test_totals_are_sums_over_layers():
    report = PruneReport("cap", "global", "marginal", 0.5, [layer("a", 3, 0.25), layer("b", 7, 0.5)])
    assert (report.num_weights, report.num_zeros, report.sparsity, report.loss) == (20, 10, 0.5, 0.75)
    found = report.to_dict()
    assert found["sparsity"] == 0.5
    assert [each["sparsity"] for each in found["layers"]] == [0.3, 0.7]


def test_a_loss_that_nobody_measured_is_none():
    assert PruneReport("magnitude", "global", "marginal", 0.5, [layer("a", 3, None)]).to_dict()["loss"] is None


def test_a_search_knows_what_was_found_and_what_was_refused():
    tried = [(0.5, True), (0.75, False), (0.6, True), (0.7, False), (0.65, False)]
    evaluations = [Evaluated(sparsity, 0.9, 0.01, 0.002, kept, 1.5) for sparsity, kept in tried]
    report = SearchReport(0.02, 0.05, 0.91, 200, evaluations, 0.6, True)
    assert report.found is evaluations[2]
    assert report.refused is evaluations[4]
    assert report.found.lost == "0.0100 ± 0.0020"
    assert Evaluated(0.5, 0.9, 0.01, None, True, 1.5).lost == "0.0100"
    assert SearchReport(0.02, 0.05, 0.91, 200, evaluations[:1], 0.5).refused is None
    assert SearchReport(0.02, 0.05, 0.91).found is None
    found = report.to_dict()
    assert found["evaluations"][1] == {
        "sparsity": 0.75,
        "score": 0.9,
        "drop": 0.01,
        "drop_se": 0.002,
        "kept": False,
        "seconds": 1.5,
    }
    assert (found["sparsity"], found["complete"], found["remarks"]) == (0.6, True, [])


def test_phases_know_their_seconds_and_their_own_peak():
    phases = Phases()
    with phases("large"):
        held = torch.zeros(64 * 2**20 // 4)
        held += 1
    with phases("small"):
        pass
    large, small = phases.records
    assert (large["phase"], small["phase"]) == ("large", "small")
    assert large["seconds"] >= 0
    assert large["peak_memory_bytes"]["cpu"] >= 64 * 2**20
    assert peak_memory()["cpu"] > 0


def test_versions_are_those_of_the_packages():
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
