"""What is measured has one name, one heading and one way of being shown."""

from cap_hf.checkpoints.metrics import METRICS, Measured, measured_in


def test_every_metric_is_a_checked_entry_of_a_report():
    keys = [metric.key for metric in METRICS]
    assert set(keys) < set(Measured.__annotations__)
    for columns in (keys, [metric.name for metric in METRICS], [metric.heading for metric in METRICS]):
        assert len(set(columns)) == len(METRICS)


def test_figures():
    shown = {metric.key: metric.show(0.5) for metric in METRICS}
    assert (shown["top1"], shown["loss"], shown["knn_top1"], shown["cosine"]) == ("50.00", "0.5000", "50.00", "0.5000")
    assert METRICS[0].show(None) == "-"


def test_what_was_measured_has_the_order_of_the_list_whatever_was_first():
    found = measured_in([{"cosine": 1.0, "num_examples": 2}, None, {"loss": 1.0, "top1": 0.5, "knn_top1_se": 0.1}])
    assert [metric.key for metric in found] == ["top1", "loss", "cosine"]
    assert measured_in([None, {}]) == []
