"""A report tells of the zeros that there are; what a refit adds to it is in test_refitting.py."""

import torch
from support.recovery import sparse_vit

from cap_hf.collection.reporting import recount
from cap_hf.masks import describe_masks
from cap_hf.report import LayerReport, PruneReport
from cap_hf.targets import find_targets


def test_zeros_that_rounding_has_made_are_counted_and_told(caplog):
    targets = find_targets(sparse_vit())
    layers = [LayerReport(**mask, block_size=8, loss=0.5) for mask in describe_masks(targets)]
    report = PruneReport("cap", "global", "marginal", 0.6, layers)
    before = report.num_zeros
    recount(report, targets, "healed", torch.float16)
    assert report.num_zeros == before
    assert not caplog.records
    weight = targets[1].weight
    place = tuple(weight.detach().nonzero()[0])
    with torch.no_grad():
        weight[place] = 0
    recount(report, targets, "healed", torch.float16)
    assert report.num_zeros == before + 1
    assert report.layers[1].mask_digest == describe_masks(targets)[1]["mask_digest"]
    assert report.layers[1].loss == 0.5
    assert "1 healed weights are too small for torch.float16 and have become 0" in caplog.text
