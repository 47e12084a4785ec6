"""Gradient samples and block Fishers against a plain loop of autograd over single examples."""

import pytest
import torch
from support.models import ARCHITECTURES, build, random_batches
from torch import nn
from torch.nn import functional as F

from cap_hf.errors import CAPError
from cap_hf.method.fisher import BlockFisher, SymmetricSums, damps, sums_per_block
from cap_hf.method.gradients import GradientSamples, labels_for
from cap_hf.targets import Target, find_targets


def loop_gradients(module, inputs, weigh, group):
    """One autograd call an example; the mean over each group of examples."""
    grads = []
    for example in range(len(inputs)):
        loss = (module(inputs[example : example + 1]) * weigh[example : example + 1]).sum()
        grads.append(torch.autograd.grad(loss, module.weight)[0])
    return torch.stack(grads).unflatten(0, (-1, group)).mean(dim=1)


def whole(target, gradients):
    """All gradients of a layer, made in pieces of 2 rows, `(samples, rows, row)`."""
    pieces = []
    for start in range(0, len(target.weight), 2):
        height = min(2, len(target.weight) - start)
        pieces.append(target.weight.new_empty(gradients.samples, height, target.row_size))
        gradients.rows(start, start + height, pieces[-1])
    return torch.cat(pieces, dim=1)


LAYERS = {
    "linear 2-d": (nn.Linear(6, 5), (4, 6)),
    "linear 3-d": (nn.Linear(6, 5, bias=False), (4, 7, 6)),
    "linear 4-d": (nn.Linear(6, 5), (4, 3, 2, 6)),
    "conv": (nn.Conv2d(4, 6, 3), (4, 4, 8, 9)),
    "conv stride, padding, dilation": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        (4, 4, 9, 8),
    ),
    "conv groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 7, 7)),
    "conv depthwise": (nn.Conv2d(4, 4, 5, groups=4, padding=2, stride=2), (4, 4, 8, 8)),
    "conv same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (4, 4, 7, 7)),
    "conv reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 4, 7, 7)),
    "conv 1x1": (nn.Conv2d(4, 6, 1, stride=2), (4, 4, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("group", [1, 2])
def test_gradient_samples_equal_a_loop(name, group):
    module, shape = LAYERS[name]
    module = module.double()
    torch.manual_seed(0)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn_like(module(inputs))
    expected = loop_gradients(module, inputs, weigh, group)
    found = {}
    target = Target("layer", module, module.weight[0].numel())
    with GradientSamples([target], lambda t, grads: found.update({t.name: whole(t, grads)})) as hooks:
        hooks.start(len(inputs) // group)
        (module(inputs) * weigh).sum().backward()
    torch.testing.assert_close(found["layer"] / group, target.to_blocks(expected))


@pytest.mark.parametrize("parts", [[4], [1, 3], [2, 1, 1]])
def test_a_module_called_twice_gives_one_gradient(parts):
    module = nn.Linear(5, 5).double()
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = []
    for example in inputs.detach():
        loss = module(module(example).tanh()).square().sum()
        expected.append(torch.autograd.grad(loss, module.weight)[0])
    found = []
    with GradientSamples([Target("layer", module, 5)], lambda t, grads: found.append(whole(t, grads))) as hooks:
        # What a step that was given up has left is forgotten.
        hooks.start(1)
        module(inputs[:1])
        for index, part in enumerate(inputs.split(parts)):
            assert not found
            hooks.start(len(part), last=index == len(parts) - 1)
            module(module(part).tanh()).square().sum().backward()
    assert len(found) == 1
    torch.testing.assert_close(found[0], torch.stack(expected))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("group", "at_a_time"), [(1, None), (1, 3), (2, None), (2, 1)])
def test_block_fisher_equals_a_loop_on_every_architecture(name, group, at_a_time):
    model = build(name).double()
    targets = find_targets(model, block_size=24)
    batches = random_batches(model, ARCHITECTURES[name][1])
    fisher = BlockFisher(targets, at_a_time=at_a_time)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fisher.collect(model, [(batch, 4 // group, None) for batch in batches])
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
        fisher = BlockFisher(find_targets(each))
        batches = random_batches(model, 8)
        fisher.collect(
            each,
            [({k: v.to(each.dtype) if v.is_floating_point() else v for k, v in b.items()}, 4, None) for b in batches],
        )
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
        BlockFisher(find_targets(model)).collect(model, [(random_batches(model, 8)[0], 4, None)])
    assert not model.get_submodule(name)._forward_hooks


def test_a_layer_that_mixes_examples_is_named():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pixel_values):
            return self.linear(pixel_values.flatten(1).mean(dim=0, keepdim=True))

    model = Mixer()
    with GradientSamples([Target("linear", model.linear, 4)], lambda *_: None) as hooks:
        hooks.start(4)
        with pytest.raises(CAPError, match="linear mixes examples.*--exclude"):
            model(torch.randn(4, 1, 2, 2, requires_grad=True))


def test_a_target_outside_the_forward_pass_is_named():
    model = build("ViT")
    model.vit.unused = nn.Linear(4, 4)
    with pytest.raises(CAPError, match="vit.unused take no part"):
        BlockFisher(find_targets(model)).collect(model, [(random_batches(model, 8)[0], 4, None)])


def test_parts_of_a_step_have_their_own_sampled_labels():
    model = build("ViT").double()
    (batch,) = random_batches(model, 8, sizes=(6,))
    batch["pixel_values"] = batch["pixel_values"].double()
    uniforms = torch.rand(6, generator=torch.Generator().manual_seed(1))
    sums = []
    for at_a_time in (None, 2):
        fisher = BlockFisher(find_targets(model), at_a_time=at_a_time)
        fisher.collect(model, [(batch, 6, uniforms)])
        sums.append(fisher.sums)
    for name, whole in sums[0].items():
        torch.testing.assert_close(sums[1][name].full(), whole.full(), rtol=1e-10, atol=1e-14)


def test_sampled_labels_follow_the_model():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    labels = labels_for(probabilities.log().expand(1000, 4), torch.zeros(1000), uniforms)
    assert torch.bincount(labels, minlength=4).tolist() == [100, 0, 600, 300]
    given = torch.tensor([3, 1])
    assert labels_for(torch.randn(2, 4), given, None) is given


def test_dead_blocks_are_named_and_a_dead_target_gets_a_damp(caplog):
    model = build("ViT")
    targets = find_targets(model, include=["vit.layers.0.*"])
    fisher = BlockFisher(targets)
    fisher.collect(model, [(random_batches(model, 8)[0], 4, None)])
    fisher.sums[targets[0].name].zero_()
    for strip in fisher.sums[targets[1].name].strips:
        strip[3].zero_()
    found = damps(fisher.mean_diagonals(), 1e-3, absolute=False)
    assert all(damp > 0 for damp in found.values())
    assert f"{targets[0].name}: 16 of 16 blocks" in caplog.text
    assert f"{targets[1].name}: 1 of 16 blocks" in caplog.text
    alive = targets[2].name
    mean = fisher.sums[alive].diagonals().double().mean() / 4
    assert found[alive] == pytest.approx(1e-3 * float(mean))
    assert set(damps(fisher.mean_diagonals(), 1e-7, absolute=True).values()) == {1e-7}
    for sums in fisher.sums.values():
        sums.zero_()
    with pytest.raises(CAPError, match="all gradients are 0"):
        damps(fisher.mean_diagonals(), 1e-3, absolute=False)


@pytest.mark.parametrize("size", [4, 16, 33, 96, 200])
def test_symmetric_sums_are_whole_products(size):
    """Little more than half is stored, and what is read back is the whole product."""
    torch.manual_seed(0)
    factors = torch.randn(3, 7, size, dtype=torch.float64)
    sums = SymmetricSums.zeros(3, size, torch.float64, torch.device("cpu"))
    sums.add(slice(0, 2), factors[:2])
    sums.add(slice(1, 3), factors[1:])
    expected = factors.mT @ factors * torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(sums.full(), expected)
    torch.testing.assert_close(sums.full(torch.tensor([2, 0])), expected[[2, 0]])
    torch.testing.assert_close(sums.diagonals(), expected.diagonal(dim1=1, dim2=2))
    stored = sum(strip[0].numel() for strip in sums.strips)
    assert stored == sums_per_block(size)
    if size >= 96:
        assert stored < 0.6 * size**2


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_gradients_in_bfloat16_leave_a_small_error(name):
    """Each gradient is rounded to 8 bits: F stays positive semidefinite and moves by well below its damp's share."""
    model = build(name)
    targets = find_targets(model)
    batches = [(batch, 4, None) for batch in random_batches(model, ARCHITECTURES[name][1], sizes=(4,) * 8)]
    exact, rounded = BlockFisher(targets), BlockFisher(targets, dtype=torch.bfloat16)
    for fisher in (exact, rounded):
        fisher.collect(model, batches)
    for target in targets:
        whole_, other = exact.sums[target.name].full(), rounded.sums[target.name].full()
        error = (other - whole_).norm() / whole_.norm()
        assert 0 < error < 4e-3, target.name
        assert torch.linalg.eigvalsh(other).min() > -1e-5 * other.diagonal(dim1=1, dim2=2).max()
