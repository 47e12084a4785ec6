"""What is measured has one name, one heading and one way of being shown."""

from cap_hf.checkpoints.metrics import METRICS, Measured, measured_in


def test_every_metric_is_a_checked_entry_of_a_report():
    keys = [metric.key for metric in METRICS]
    assert set(keys) < set(Measured.__annotations__)
    for columns in (keys, [metric.name for metric in METRICS], [metric.heading for metric in METRICS]):
        assert len(set(columns)) == len(METRICS)


def test_figures():
    shown = {metric.key: metric.show({metric.key: 0.5}) for metric in METRICS}
    assert (shown["top1"], shown["loss"], shown["knn_top1"], shown["cosine"]) == ("50.00", "0.5000", "50.00", "0.5000")
    top1, loss = METRICS[0], METRICS[2]
    assert top1.show(None) == top1.show({"loss": 1.0}) == "-"
    assert top1.show({"top1": 0.76, "top1_se": 0.00604}) == "76.00 ± 0.60"
    assert loss.show({"loss": 1.5, "loss_se": 0.01}) == "1.5000 ± 0.0100"
    assert loss.show({"loss": 1.5, "loss_se": 0.01}, error=False) == "1.5000"


def test_drops():
    dense, sparse = {"top1": 0.76, "top1_se": 0.006}, {"top1": 0.748, "top1_se": 0.006, "top1_drop_se": 0.004}
    top1 = METRICS[0]
    assert top1.show_drop(sparse, dense) == "1.20 ± 0.40"
    assert top1.show_drop({"top1": 0.77}, dense) == "-1.00"
    assert {top1.show_drop(*each) for each in ((dense, dense), (None, dense), (sparse, None), (sparse, {}))} == {"-"}


def test_every_error_is_a_checked_entry_of_a_report():
    for metric in METRICS:
        names = {f"{metric.key}{end}" for end in ("_se", "_drop_se")}
        assert not metric.drop or names <= set(Measured.__annotations__)


def test_what_was_measured_has_the_order_of_the_list_whatever_was_first():
    found = measured_in([{"cosine": 1.0, "num_examples": 2}, None, {"loss": 1.0, "top1": 0.5, "knn_top1_se": 0.1}])
    assert [metric.key for metric in found] == ["top1", "loss", "cosine"]
    assert measured_in([None, {}]) == []
