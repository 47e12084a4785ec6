"""The baselines against plain versions of what their papers say."""

import torch
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.config import NMPattern
from cap_hf.method.baselines import rank_scores


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
        diagonal = torch.linalg.inv(damped).diagonal(dim1=-2, dim2=-1)
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


def test_rank_scores_with_a_pattern():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.1, 0.4, 0.2, 0.3]])
    assert rank_scores(scores, None).order[0].tolist() == [4, 6, 7, 5, 1, 3, 2, 0]
    found = rank_scores(scores, NMPattern(2, 4))
    assert found.order[0].tolist() == [4, 6, 1, 3]
    torch.testing.assert_close(found.losses[0], torch.tensor([0.1, 0.2, 1.0, 2.0]))
