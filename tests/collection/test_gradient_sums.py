"""Sums of gradients against a plain loop of autograd over single examples."""

import pytest
import torch
from support.models import ARCHITECTURES, build, random_batches
from support.sums import fill
from torch import nn
from torch.nn import functional as F

from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.kept_states import WholeModel
from cap_hf.errors import CAPError
from cap_hf.method.losses import SampledLabelLoss
from cap_hf.targets import find_targets


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("group", "at_a_time"), [(1, None), (1, 3), (2, None), (2, 1)])
def test_block_fisher_equals_a_loop_on_every_architecture(name, group, at_a_time):
    model = build(name).double()
    targets = find_targets(model, block_size=24)
    batches = random_batches(model, ARCHITECTURES[name][1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fisher = fill(GradientSums(targets, microbatch=at_a_time), model, [(batch, 4 // group, None) for batch in batches])
    assert fisher.count == 8 // group
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    expected = {target.name: torch.zeros_like(fisher.sums[target.name].full()) for target in targets}
    for batch in batches:
        for start in range(0, 4, group):
            examples = slice(start, start + group)
            logits = model(pixel_values=batch["pixel_values"][examples]).logits
            loss = F.cross_entropy(logits, batch["labels"][examples])
            grads = torch.autograd.grad(loss, [target.weight for target in targets])
            for target, grad in zip(targets, grads, strict=True):
                blocks = target.to_blocks(grad)
                expected[target.name] += blocks[:, :, None] * blocks[:, None, :]
    for target in targets:
        torch.testing.assert_close(fisher.sums[target.name].full(), expected[target.name])


def test_float32_sums_are_close_to_float64():
    model, single = build("ViT").double(), build("ViT")
    sums = []
    for each in (model, single):
        batches = [
            ({k: v.to(each.dtype) if v.is_floating_point() else v for k, v in b.items()}, 4, None)
            for b in random_batches(model, 8)
        ]
        fisher = fill(GradientSums(find_targets(each)), each, batches)
        sums.append(fisher.sums)
    for name, exact in sums[0].items():
        exact = exact.full()
        error = (sums[1][name].full() - exact).norm() / exact.norm()
        assert error < 1e-4, name


def test_infinite_gradients_name_the_layer():
    model = build("ViT")
    name = "vit.layers.1.mlp.fc2"
    model.get_submodule(name).weight.data[0, 0] = float("inf")
    with pytest.raises(CAPError, match="NaN or infinite in vit"):
        fill(GradientSums(find_targets(model)), model, [(random_batches(model, 8)[0], 4, None)])
    assert not model.get_submodule(name)._forward_hooks


def test_a_target_outside_the_forward_pass_is_named():
    model = build("ViT")
    model.vit.unused = nn.Linear(4, 4)
    with pytest.raises(CAPError, match="vit.unused take no part"):
        fill(GradientSums(find_targets(model)), model, [(random_batches(model, 8)[0], 4, None)])


def test_parts_of_a_step_have_their_own_sampled_labels():
    model = build("ViT").double()
    (batch,) = random_batches(model, 8, sizes=(6,))
    batch["pixel_values"] = batch["pixel_values"].double()
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(1))
    sums = []
    for at_a_time in (None, 2):
        fisher = fill(
            GradientSums(find_targets(model), microbatch=at_a_time, through=WholeModel(SampledLabelLoss())),
            model,
            [(batch, 6, uniforms)],
        )
        sums.append(fisher.sums)
    for name, whole in sums[0].items():
        torch.testing.assert_close(sums[1][name].full(), whole.full(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_gradients_in_bfloat16_leave_a_small_error(name):
    """Each gradient is rounded to 8 bits: F stays positive semidefinite and moves by well below its damp's share."""
    model = build(name)
    targets = find_targets(model)
    batches = [(batch, 4, None) for batch in random_batches(model, ARCHITECTURES[name][1], sizes=(4,) * 8)]
    exact, rounded = GradientSums(targets), GradientSums(targets, dtype=torch.bfloat16)
    for fisher in (exact, rounded):
        fill(fisher, model, batches)
    for target in targets:
        whole_, other = exact.sums[target.name].full(), rounded.sums[target.name].full()
        error = (other - whole_).norm() / whole_.norm()
        assert 0 < error < 4e-3, target.name
        assert torch.linalg.eigvalsh(other).min() > -1e-5 * other.diagonal(dim1=1, dim2=2).max()
