"""The baselines against plain versions of what their papers say."""

import pytest
import torch
from support.models import build, random_batches
from support.quadratics import inverse_of
from torch import nn
from torch.nn import functional as F

from cap_hf import CAPCompressor, CAPConfig, find_targets
from cap_hf.method.baselines import rank_scores
from cap_hf.patterns import NMPattern


def test_magnitude_is_a_global_sort():
    model = build("ViT")
    compressor = CAPCompressor(model, CAPConfig(method="magnitude"))
    magnitudes = torch.cat([target.weight.detach().abs().flatten() for target in compressor.targets])
    threshold = magnitudes.sort().values[round(0.8 * len(magnitudes)) - 1]
    dense = {target.name: target.weight.detach().clone() for target in compressor.targets}
    compressor.prune(0.8)
    for target in compressor.targets:
        expected = dense[target.name].masked_fill(dense[target.name].abs() <= threshold, 0.0)
        assert torch.equal(target.weight, expected)


def test_obs_ranks_all_weights_at_once_by_their_own_saliency():
    model = build("ViT").double()
    compressor = CAPCompressor(model, CAPConfig(method="obs", num_grads=16, weight_update="none"))
    compressor.collect(random_batches(model, 8, sizes=(16,)))
    saliencies = {}
    for target in compressor.targets:
        damped = compressor.fisher.damped(target, slice(None))
        diagonal = inverse_of(damped).diagonal(dim1=-2, dim2=-1)
        saliencies[target.name] = target.to_blocks(target.weight.detach()).square() / diagonal / 2
    everything = torch.cat([each.flatten() for each in saliencies.values()])
    threshold = everything.sort().values[round(0.75 * len(everything)) - 1]
    compressor.prune(0.75)
    wrong = sum(
        int(((target.to_blocks(target.weight) == 0) != (saliencies[target.name] <= threshold)).sum())
        for target in compressor.targets
    )
    # Losses are compared in float32: two that agree to 7 digits may change places.
    assert wrong <= 2


def test_sparsegpt_is_better_than_magnitude_at_its_own_objective():
    losses = {}
    for method in ("sparsegpt", "magnitude"):
        model = build("ViT")
        batch = random_batches(model, 8, sizes=(32,))[0]
        hidden = model.vit.layers[0].mlp.fc1
        seen = {}
        hidden.register_forward_hook(lambda module, args, output, seen=seen: seen.update(x=args[0], y=output))
        with torch.no_grad():
            model(pixel_values=batch["pixel_values"])
        inputs, outputs = seen["x"], seen["y"]
        config = CAPConfig(method=method, num_grads=32, allocation="uniform", include=["vit.layers.0.mlp.fc1"])
        CAPCompressor(model, config).collect([batch]).prune(0.5)
        losses[method] = float((hidden(inputs) - outputs).square().sum())
    assert losses["sparsegpt"] < 0.7 * losses["magnitude"]


def as_rows(weight):
    """A weight's rows, the input channels of a convolution last."""
    return weight.detach().clone().permute(0, *range(2, weight.dim()), 1).flatten(1)


def inputs_of(model, batch):
    """The inputs of all targets in a forward pass, in float64, as rows that a weight's rows are multiplied with."""
    seen, handles = {}, []
    for target in find_targets(model):

        def keep(module, args, output, name=target.name):
            x = args[0].double()
            if isinstance(module, nn.Conv2d):
                patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                # Channels are the last, as N:M counts them.
                x = patches.unflatten(1, (module.groups, -1, module.weight[0, 0].numel()))
                x = x.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)
            else:
                x = x.reshape(1, -1, x.shape[-1])
            seen[name] = x

        handles.append(target.module.register_forward_hook(keep))
    with torch.no_grad():
        model(pixel_values=batch["pixel_values"])
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("name", "side"), [("ViT", 8), ("ConvNext", 32)])
@pytest.mark.parametrize("allocation", ["global", "uniform", "2:4"])
def test_wanda_removes_in_every_row_the_smallest_products_of_weight_and_input_norm(name, side, allocation):
    """Against a loop over rows in float64 (arXiv 2306.11695, Algorithm 1): patches, depthwise groups, zeros first."""
    model = build(name).double()
    exclude = ["*dwconv*"] if name == "ConvNext" and allocation == "2:4" else None
    for target in find_targets(model):
        target.weight.data.view(-1)[::7] = 0
    batch = random_batches(model, side, sizes=(6,))[0]
    batch["pixel_values"] = batch["pixel_values"].double()
    inputs, dense = inputs_of(model, batch), {each.name: as_rows(each.weight) for each in find_targets(model)}
    config = CAPConfig(method="wanda", num_grads=6, allocation=allocation, exclude=exclude)
    compressor = CAPCompressor(model, config).collect([batch])
    compressor.prune(None if allocation == "2:4" else 0.6)
    wrong = 0
    for target in compressor.targets:
        groups, rows = inputs[target.name], as_rows(target.weight)
        for index, (row, old) in enumerate(zip(rows, dense[target.name], strict=True)):
            norms = groups[index * len(groups) // len(rows)].square().sum(dim=0).sqrt()
            scores = (old.abs() * norms).masked_fill(old == 0, -1)
            if allocation == "2:4":
                lowest = scores.view(-1, 4).argsort(dim=1, stable=True)[:, :2]
                removed = (lowest + 4 * torch.arange(len(row) // 4)[:, None]).flatten()
            else:
                count = int((row == 0).sum())
                # Each row gives up the same share; of equal ranks those of the first rows go first.
                assert abs(count - 0.6 * len(row)) < 1
                removed = scores.argsort(stable=True)[:count]
            expected = old.index_fill(0, removed, 0.0)
            wrong += not torch.equal(row, expected)
    assert wrong == 0


def test_rank_scores_with_a_pattern():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.1, 0.4, 0.2, 0.3]])
    assert rank_scores(scores, None).order[0].tolist() == [4, 6, 7, 5, 1, 3, 2, 0]
    found = rank_scores(scores, NMPattern(2, 4))
    assert found.order[0].tolist() == [4, 6, 1, 3]
    torch.testing.assert_close(found.losses[0], torch.tensor([0.1, 0.2, 1.0, 2.0]))
