"""Budgets as they are typed, and costs along a curve."""

import pytest

from cap_hf.budget import Budget, CostCurve, corrected, parse_budgets
from cap_hf.errors import CAPError


def test_budgets_come_with_the_largest_first_and_once():
    assert parse_budgets(["flops=0.3", "flops=0.4", "flops=.30"]) == [Budget("flops", 0.4), Budget("flops", 0.3)]
    assert f"{Budget('latency-int8', 0.5)}" == str(Budget("latency-int8", 0.5)) == "latency-int8=0.5"
    assert f"{Budget('flops', 0.123456789):.3g}" == "flops=0.123"


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (["0.4"], "budget '0.4' is no KIND=SHARE such as flops=0.4; kinds are flops, bytes, latency, latency-int8"),
        (["flops"], "budget 'flops' is no KIND=SHARE"),
        (["flops=half"], "budget 'flops=half' is no KIND=SHARE"),
        (["macs=0.4"], "budget 'macs' is none of flops, bytes, latency, latency-int8"),
        (["flops=1"], "budget flops=1 is not between 0 and 1"),
        (["flops=0"], "budget flops=0 is not between 0 and 1"),
        (["flops=nan"], "budget flops=nan is not between 0 and 1"),
        (["flops=0.4", "bytes=0.3"], "budgets of flops and bytes are for a run each"),
    ],
)
def test_what_is_no_budget_is_one_line(texts, line):
    with pytest.raises(CAPError, match=line) as raised:
        parse_budgets(texts)
    assert "\n" not in str(raised.value)


def test_in_python_a_share_is_a_number():
    with pytest.raises(CAPError, match="budget flops='0.4' is no number: pass such as flops=0.5"):
        Budget("flops", "0.4")
    with pytest.raises(CAPError, match="budget flops=True is no number"):
        Budget("flops", True)


def test_what_says_how_much_each_target_keeps_does_not_go_with_one():
    Budget("flops", 0.4).check("global", "marginal")
    for allocation in ("uniform", "2:4"):
        with pytest.raises(CAPError, match=f"allocation={allocation} says how much each .* does not go with flops=0.4"):
            Budget("flops", 0.4).check(allocation, "marginal")
    with pytest.raises(CAPError, match="selection=cumulative has no loss of a single removal to weigh"):
        Budget("flops", 0.4).check("global", "cumulative")


def test_a_curve_is_linear_between_its_points():
    curve = CostCurve((0, 4, 10), (12.0, 12.0, 0.0))
    assert [curve.at(removed) for removed in (0, 3, 4, 5, 9, 10)] == [12, 12, 12, 10, 2, 0]
    assert curve.pieces() == [(0, 4, 0.0), (4, 10, 2.0)]
    for removals, costs in (((0, 4), (1.0, 2.0)), ((1, 4), (2.0, 1.0)), ((0, 4, 4), (2.0, 1.0, 0.0))):
        with pytest.raises(ValueError, match="begin with 0 and rise"):
            CostCurve(removals, costs)


def test_whole_costs_stay_whole():
    curve = CostCurve((0, 999_999), (999_999.0 * 3_137, 0.0))
    assert curve.at(333_333) == 666_666 * 3_137


def test_what_layers_are_predicted_to_take_adds_up_to_what_is_measured_without_any_weight():
    curves = [CostCurve((0, 1, 10), (4.0, 3.6, 1.0)), CostCurve((0, 2, 3, 10), (6.0, 6.0, 5.0, 1.5))]
    curves.append(CostCurve((0, 5), (0.0, 0.0)))
    for empty in (0.5, -1.0, 3.5):
        found = corrected(curves, empty)
        assert sum(curve.costs[-1] for curve in found) == pytest.approx(empty)
        # What stays dense takes what it did, and each of the others as much more or less for what it took.
        assert [curve.at(0) for curve in found] == [4.0, 6.0, 0.0]
        assert found[1].at(2) == 6.0
        moved = [
            (curve.costs[-1] - before.costs[-1]) / before.costs[0]
            for curve, before in zip(found[:2], curves[:2], strict=True)
        ]
        assert moved[0] == pytest.approx(moved[1])
    # Nothing takes longer than it does dense, whatever is measured.
    assert corrected(curves, 9.0)[0].costs == (4.0, 4.0, 3.6)
