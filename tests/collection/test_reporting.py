"""What a report says after a prune and after a refit."""

import torch
from support.models import build

from cap_hf import CAPCompressor, CAPConfig, find_targets
from cap_hf.collection.reporting import report_pruning, report_refit
from cap_hf.masks import differing_layers
from cap_hf.report import RefitReport


def test_layers_without_a_weight_are_named_and_a_refit_keeps_the_losses(caplog):
    model = build("ViT")
    targets = find_targets(model)
    targets[1].weight.data.zero_()
    losses = [float(index) for index in range(len(targets))]
    report = report_pruning(targets, CAPConfig(), 0.5, losses)
    assert "No weight is left in vit.layers.0.attention.k_proj: consider --exclude" in caplog.text
    assert (report.method, report.allocation, report.selection) == ("cap", "global", "marginal")
    assert (report.requested_sparsity, report.refit) == (0.5, None)
    assert [layer.loss for layer in report.layers] == losses
    assert differing_layers(targets, report.to_dict()) == []
    # What is another zero now is one in the report too.
    targets[2].weight.data[0, 0], targets[2].weight.data[1, 1] = 0, 0
    done = RefitReport(192, 0.03, ["a"])
    report_refit(report, targets, done, torch.float16)
    assert "2 refitted weights are too small for torch.float16 and have become 0" in caplog.text
    assert report.refit == done
    assert [layer.loss for layer in report.layers] == losses
    assert report.num_zeros == targets[1].weight.numel() + 2
    assert differing_layers(targets, report.to_dict()) == []


def test_a_survivor_that_the_dtype_cannot_hold_is_told(caplog):
    model = build("ViT")
    rows = [{"pixel_values": torch.randn(8, 3, 8, 8)}]
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", refit_examples=8), dtype=torch.float16)
    compressor.prune(0.5)
    weight = compressor.targets[0].weight
    # So near to 0 that nothing but rounding tells it from it; the ridge holds it there.
    compressor.config = CAPConfig(method="magnitude", refit_examples=8, refit_ridge=1e9)
    row, column = (weight != 0).nonzero()[0].tolist()
    weight.data[row, column] = 1e-9
    report = compressor.refit(rows)
    assert "1 refitted weights are too small for torch.float16 and have become 0" in caplog.text
    assert report.num_zeros == sum(int((target.weight == 0).sum()) for target in compressor.targets)
